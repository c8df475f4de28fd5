//! Who has which device: all of a lease's devices or none.

use farm_core::id::{AttemptKey, DeviceIndex};

/// Why an attempt does not get its devices.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the lease names no device")]
    NoDevice,
    #[error("the lease names device {0} twice")]
    Repeated(DeviceIndex),
    #[error("the lease names device {device}, the node has {count}")]
    Unknown { device: DeviceIndex, count: usize },
    #[error("device {device} is busy with attempt {holder}")]
    Busy { device: DeviceIndex, holder: AttemptKey },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserve {
    /// The attempt has its devices.
    Granted,
    /// It gets them when the aborted attempts before it have let go. A device only stops between two steps, and the
    /// scheduler, which has forgotten the aborted attempt already, may lease the device again before that.
    Waiting,
}

#[derive(Clone, Copy, Debug)]
struct Holder {
    key: AttemptKey,
    stopping: bool,
}

#[derive(Clone, Debug)]
pub struct Devices {
    holders: Vec<Option<Holder>>,
    waiting: Vec<(AttemptKey, Vec<DeviceIndex>)>,
}

impl Devices {
    pub fn new(count: usize) -> Self {
        Self { holders: vec![None; count], waiting: Vec::new() }
    }

    /// Takes all of `devices` for the attempt, queues for them, or takes none.
    pub fn reserve(&mut self, key: AttemptKey, devices: &[DeviceIndex]) -> Result<Reserve, Refusal> {
        if devices.is_empty() {
            return Err(Refusal::NoDevice);
        }
        let mut free = true;
        for (i, &device) in devices.iter().enumerate() {
            if devices[..i].contains(&device) {
                return Err(Refusal::Repeated(device));
            }
            let holder =
                self.holders.get(device.0 as usize).ok_or(Refusal::Unknown { device, count: self.holders.len() })?;
            match holder {
                Some(Holder { key: holder, stopping: false }) => return Err(Refusal::Busy { device, holder: *holder }),
                Some(_) => free = false,
                None => {}
            }
            if let Some((holder, _)) = self.waiting.iter().find(|(_, wanted)| wanted.contains(&device)) {
                return Err(Refusal::Busy { device, holder: *holder });
            }
        }
        if free {
            self.take(key, devices);
            return Ok(Reserve::Granted);
        }
        self.waiting.push((key, devices.to_vec()));
        Ok(Reserve::Waiting)
    }

    /// The attempt was aborted: it leaves the queue, or its devices may be queued for. True if it was only queued.
    pub fn abort(&mut self, key: AttemptKey) -> bool {
        let queued = self.waiting.len();
        self.waiting.retain(|(waiting, _)| *waiting != key);
        for holder in self.holders.iter_mut().flatten().filter(|holder| holder.key == key) {
            holder.stopping = true;
        }
        self.waiting.len() < queued
    }

    /// The attempt's devices are idle. Returns the attempts that have got theirs now.
    pub fn release(&mut self, key: AttemptKey) -> Vec<AttemptKey> {
        for holder in &mut self.holders {
            if holder.is_some_and(|holder| holder.key == key) {
                *holder = None;
            }
        }
        let holders = &self.holders;
        let idle = |devices: &Vec<DeviceIndex>| devices.iter().all(|device| holders[device.0 as usize].is_none());
        let (granted, waiting) = std::mem::take(&mut self.waiting).into_iter().partition(|(_, devices)| idle(devices));
        self.waiting = waiting;
        let granted: Vec<(AttemptKey, Vec<DeviceIndex>)> = granted;
        for (key, devices) in &granted {
            self.take(*key, devices);
        }
        granted.into_iter().map(|(key, _)| key).collect()
    }

    fn take(&mut self, key: AttemptKey, devices: &[DeviceIndex]) {
        for device in devices {
            self.holders[device.0 as usize] = Some(Holder { key, stopping: false });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use farm_core::id::{AttemptNo, Epoch, JobId};
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn key(n: u32) -> AttemptKey {
        AttemptKey { job: JobId(Uuid::from_u128(1)), attempt: AttemptNo(n), epoch: Epoch(1) }
    }

    fn on(devices: &[u32]) -> Vec<DeviceIndex> {
        devices.iter().copied().map(DeviceIndex).collect()
    }

    #[test]
    fn a_lease_gets_all_its_devices_or_none() {
        let mut devices = Devices::new(3);
        assert_eq!(devices.reserve(key(1), &on(&[1])), Ok(Reserve::Granted));
        let busy = Refusal::Busy { device: DeviceIndex(1), holder: key(1) };
        assert_eq!(devices.reserve(key(2), &on(&[0, 1, 2])), Err(busy));
        // Nothing was kept by the refused lease.
        assert_eq!(devices.reserve(key(3), &on(&[0, 2])), Ok(Reserve::Granted));
    }

    #[test]
    fn a_lease_that_makes_no_sense_is_refused_by_name() {
        let mut devices = Devices::new(2);
        assert_eq!(devices.reserve(key(1), &[]), Err(Refusal::NoDevice));
        assert_eq!(devices.reserve(key(1), &on(&[1, 1])), Err(Refusal::Repeated(DeviceIndex(1))));
        let unknown = Refusal::Unknown { device: DeviceIndex(2), count: 2 };
        assert_eq!(devices.reserve(key(1), &on(&[0, 2])), Err(unknown));
        assert_eq!(devices.reserve(key(1), &on(&[0, 1])), Ok(Reserve::Granted));
    }

    #[test]
    fn a_device_that_is_being_aborted_may_be_queued_for_once() {
        let mut devices = Devices::new(2);
        devices.reserve(key(1), &on(&[0])).unwrap();
        assert!(!devices.abort(key(1)));
        assert_eq!(devices.reserve(key(2), &on(&[0, 1])), Ok(Reserve::Waiting));
        let busy = |device| Refusal::Busy { device: DeviceIndex(device), holder: key(2) };
        assert_eq!(devices.reserve(key(3), &on(&[0])), Err(busy(0)));
        assert_eq!(devices.reserve(key(3), &on(&[1])), Err(busy(1)), "a gang in the queue is not overtaken");
        assert_eq!(devices.release(key(1)), [key(2)]);
        assert!(!devices.abort(key(2)));
        assert_eq!(devices.reserve(key(4), &on(&[1])), Ok(Reserve::Waiting));
        assert!(devices.abort(key(4)), "it was only queued");
        assert_eq!(devices.release(key(2)), []);
    }

    proptest! {
        #[test]
        fn no_device_is_ever_held_twice_and_none_is_lost(
            steps in prop::collection::vec((0..3u8, prop::collection::vec(0..5u32, 0..4), any::<prop::sample::Index>()), 1..100)
        ) {
            let mut devices = Devices::new(4);
            let mut held: HashMap<AttemptKey, Vec<DeviceIndex>> = HashMap::new();
            let mut queued: HashMap<AttemptKey, Vec<DeviceIndex>> = HashMap::new();
            let mut next = 0;
            for (step, wanted, pick) in steps {
                let mut keys: Vec<AttemptKey> = held.keys().chain(queued.keys()).copied().collect();
                keys.sort_by_key(|key| key.attempt);
                let picked = (!keys.is_empty()).then(|| keys[pick.index(keys.len())]);
                match (step, picked) {
                    (0, _) => {
                        next += 1;
                        match devices.reserve(key(next), &on(&wanted)) {
                            Ok(Reserve::Granted) => { held.insert(key(next), on(&wanted)); }
                            Ok(Reserve::Waiting) => { queued.insert(key(next), on(&wanted)); }
                            Err(_) => {}
                        }
                    }
                    (1, Some(key)) => {
                        prop_assert_eq!(devices.abort(key), queued.remove(&key).is_some());
                    }
                    (2, Some(key)) if held.remove(&key).is_some() => {
                        for granted in devices.release(key) {
                            let devices = queued.remove(&granted).expect("it was queued");
                            held.insert(granted, devices);
                        }
                    }
                    _ => {}
                }
                let mut taken: Vec<DeviceIndex> = held.values().flatten().copied().collect();
                taken.sort();
                let mut distinct = taken.clone();
                distinct.dedup();
                prop_assert_eq!(taken, distinct);
            }
            // Once everybody has let go, everything is free.
            while let Some(&key) = held.keys().next() {
                held.remove(&key);
                for granted in devices.release(key) {
                    held.insert(granted, queued.remove(&granted).expect("it was queued"));
                }
            }
            prop_assert!(queued.is_empty());
            prop_assert_eq!(devices.reserve(key(next + 1), &on(&[0, 1, 2, 3])), Ok(Reserve::Granted));
        }
    }
}
