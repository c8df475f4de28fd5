//! Tenants: what each has used, may use and waits for.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use farm_core::api::{Quota, TenantSpec};
use farm_core::id::{JobId, TenantId};

use super::class::ClassIx;

/// After so long an old device-second counts half.
pub const HALF_LIFE: Duration = Duration::from_secs(24 * 60 * 60);
/// The hours that a quota of device-seconds looks at.
const QUOTA_HOURS: i64 = 24;

/// A tenant's place in the farm's table of tenants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantIx(pub u32);

/// A job's place among those of its tenant and class: higher priority first, then as submitted.
pub type Place = (Reverse<i32>, i64, u64, JobId);

#[derive(Clone, Debug)]
pub struct Tenant {
    pub id: TenantId,
    pub spec: TenantSpec,
    pub paused: bool,
    pub usage: Usage,
    /// Devices that it has now, without those that only decode for it.
    pub devices: u32,
    /// Jobs that run, and jobs that are not ended.
    pub running: u64,
    pub live: u64,
    /// Jobs that wait for nothing but devices.
    pub waiting: BTreeMap<ClassIx, BTreeSet<Place>>,
}

impl Tenant {
    pub fn new(id: TenantId, spec: TenantSpec, paused: bool) -> Self {
        Self { id, spec, paused, usage: Usage::default(), devices: 0, running: 0, live: 0, waiting: BTreeMap::new() }
    }

    pub fn quota(&self) -> Quota {
        self.spec.quota
    }

    /// Whose key is lowest goes first: decayed device-seconds over the share.
    pub fn key(&self) -> f64 {
        self.usage.scaled / self.spec.share
    }

    /// Whether so many more devices are within its quota.
    pub fn may_have(&self, devices: usize) -> bool {
        self.quota().devices.is_none_or(|most| self.devices as usize + devices <= most as usize)
    }

    /// Whether so many more device-seconds are within its quota, with all that runs counted as it was predicted.
    pub fn may_use(&self, seconds: f64, hour: i64) -> bool {
        let used = || self.usage.day_seconds(hour) + self.usage.expected + seconds;
        self.quota().device_seconds.is_none_or(|most| used() <= most as f64)
    }
}

/// Device-seconds.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// Of ended attempts and, as predicted, of running ones; in units of one device-second at the clock's zero: what is
    /// used later counts more, which orders tenants as if what was used earlier counted less.
    scaled: f64,
    /// Of running attempts, as predicted.
    expected: f64,
    /// Of ended attempts, by hour since 1970, oldest first.
    hours: VecDeque<(i64, f64)>,
}

impl Usage {
    fn weight(at: f64) -> f64 {
        (at / HALF_LIFE.as_secs_f64()).exp2()
    }

    /// Usage from before this process: `at` is in seconds on its clock, negative.
    pub fn remember(&mut self, hour: i64, seconds: f64, at: f64) {
        self.scaled += seconds * Self::weight(at);
        self.add_hour(hour, seconds);
    }

    /// An attempt starts that is expected to use so much.
    pub fn begin(&mut self, expected: f64, at: f64) {
        self.scaled += expected * Self::weight(at);
        self.expected += expected;
    }

    /// It has ended and has used so much. What was expected of it is taken back, by the weight of its start.
    pub fn end(&mut self, expected: f64, began: f64, used: f64, at: f64, hour: i64) {
        self.scaled = (self.scaled - expected * Self::weight(began) + used * Self::weight(at)).max(0.0);
        self.expected = (self.expected - expected).max(0.0);
        self.add_hour(hour, used);
    }

    fn add_hour(&mut self, hour: i64, seconds: f64) {
        match self.hours.iter_mut().rev().find(|(known, _)| *known == hour) {
            Some((_, sum)) => *sum += seconds,
            None => {
                self.hours.push_back((hour, seconds));
                self.hours.make_contiguous().sort_by_key(|(hour, _)| *hour);
            }
        }
        while self.hours.len() > QUOTA_HOURS as usize {
            self.hours.pop_front();
        }
    }

    /// Used by attempts that ended in this hour or in the 23 before; or later, by the clock of a scheduler that was ahead.
    pub fn day_seconds(&self, hour: i64) -> f64 {
        let of_day = self.hours.iter().filter(|(of, _)| *of > hour - QUOTA_HOURS);
        // The sum of no floats is minus zero, which people would be shown.
        of_day.fold(0.0, |sum, (_, used)| sum + used)
    }

    /// As it counts now: device-seconds of this moment.
    pub fn decayed(&self, at: f64) -> f64 {
        self.scaled / Self::weight(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: f64 = 86_400.0;

    #[test]
    fn a_device_second_counts_half_after_a_day() {
        let mut usage = Usage::default();
        usage.remember(0, 100.0, -DAY);
        assert!((usage.decayed(0.0) - 50.0).abs() < 1e-9);
        assert!((usage.decayed(DAY) - 25.0).abs() < 1e-9);
    }

    #[test]
    fn what_was_expected_gives_way_to_what_was_used() {
        let mut usage = Usage::default();
        usage.begin(60.0, 0.0);
        assert!((usage.decayed(0.0) - 60.0).abs() < 1e-9);
        assert!(usage.day_seconds(5).is_sign_positive(), "nothing is not minus nothing");
        usage.end(60.0, 0.0, 10.0, 30.0, 5);
        assert!((usage.decayed(30.0) - 10.0).abs() < 1e-6);
        let days = [4, 5, 28, 29].map(|hour| usage.day_seconds(hour));
        assert_eq!(days, [10.0, 10.0, 10.0, 0.0], "also by a clock that is behind");
    }

    #[test]
    fn a_quota_counts_what_runs_as_predicted() {
        let quota = Quota { devices: Some(3), queued: None, device_seconds: Some(100) };
        let mut tenant = Tenant::new(TenantId::default(), TenantSpec { share: 1.0, quota }, false);
        tenant.usage.begin(60.0, 0.0);
        tenant.devices = 2;
        assert!(tenant.may_use(40.0, 0) && !tenant.may_use(41.0, 0));
        assert!(tenant.may_have(1) && !tenant.may_have(2));
    }
}
