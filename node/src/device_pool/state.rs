//! Who has which device: all of a lease's devices or none, and single ones that help other attempts.

use std::fmt;

use farm_core::id::{AttemptKey, DeviceIndex};

/// Who may have devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Holder {
    /// A lease of this node.
    Attempt(AttemptKey),
    /// One device that decodes for an attempt of any node; each ends by itself.
    Help(AttemptKey, DeviceIndex),
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attempt(key) => write!(f, "attempt {key}"),
            Self::Help(key, _) => write!(f, "helping attempt {key}"),
        }
    }
}

/// Why a holder does not get its devices.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the lease names no device")]
    NoDevice,
    #[error("the lease names device {0} twice")]
    Repeated(DeviceIndex),
    #[error("the lease names device {device}, the node has {count}")]
    Unknown { device: DeviceIndex, count: usize },
    #[error("device {device} is busy with {holder}")]
    Busy { device: DeviceIndex, holder: Holder },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserve {
    /// The holder has its devices.
    Granted,
    /// It gets them when those before it, that were told to stop, have let go. A device only stops between two steps, and
    /// the scheduler, which has forgotten an aborted attempt already, may lease the device again before that.
    Waiting,
}

#[derive(Clone, Copy, Debug)]
struct Hold {
    holder: Holder,
    stopping: bool,
}

#[derive(Clone, Debug)]
pub struct Devices {
    holds: Vec<Option<Hold>>,
    waiting: Vec<(Holder, Vec<DeviceIndex>)>,
}

impl Devices {
    pub fn new(count: usize) -> Self {
        Self { holds: vec![None; count], waiting: Vec::new() }
    }

    /// Takes all of `devices`, queues for them, or takes none.
    pub fn reserve(&mut self, holder: Holder, devices: &[DeviceIndex]) -> Result<Reserve, Refusal> {
        if devices.is_empty() {
            return Err(Refusal::NoDevice);
        }
        let mut free = true;
        for (i, &device) in devices.iter().enumerate() {
            if devices[..i].contains(&device) {
                return Err(Refusal::Repeated(device));
            }
            let hold = self.holds.get(device.0 as usize).ok_or(Refusal::Unknown { device, count: self.holds.len() })?;
            match hold {
                Some(Hold { holder, stopping: false }) => return Err(Refusal::Busy { device, holder: *holder }),
                Some(_) => free = false,
                None => {}
            }
            if let Some((holder, _)) = self.waiting.iter().find(|(_, wanted)| wanted.contains(&device)) {
                return Err(Refusal::Busy { device, holder: *holder });
            }
        }
        if free {
            self.take(holder, devices);
            return Ok(Reserve::Granted);
        }
        self.waiting.push((holder, devices.to_vec()));
        Ok(Reserve::Waiting)
    }

    /// The holder was told to stop: it leaves the queue, or its devices may be queued for. True if it was only queued.
    pub fn abort(&mut self, holder: Holder) -> bool {
        let queued = self.waiting.len();
        self.waiting.retain(|(waiting, _)| *waiting != holder);
        for hold in self.holds.iter_mut().flatten().filter(|hold| hold.holder == holder) {
            hold.stopping = true;
        }
        self.waiting.len() < queued
    }

    /// What the holder has.
    pub fn held(&self, holder: Holder) -> Vec<DeviceIndex> {
        let held = (0..).zip(&self.holds).filter(|(_, hold)| hold.is_some_and(|hold| hold.holder == holder));
        held.map(|(index, _)| DeviceIndex(index)).collect()
    }

    /// Whose work is on the devices, each attempt once.
    pub fn attempts(&self) -> Vec<AttemptKey> {
        let mut attempts = Vec::new();
        for hold in self.holds.iter().flatten() {
            let (Holder::Attempt(key) | Holder::Help(key, _)) = hold.holder;
            if !attempts.contains(&key) {
                attempts.push(key);
            }
        }
        attempts
    }

    /// A device of the holder is idle. Returns those in the queue that have got theirs now.
    pub fn release(&mut self, holder: Holder, device: DeviceIndex) -> Vec<Holder> {
        if let Some(hold) = self.holds.get_mut(device.0 as usize)
            && hold.is_some_and(|hold| hold.holder == holder)
        {
            *hold = None;
        }
        let holds = &self.holds;
        let idle = |devices: &Vec<DeviceIndex>| devices.iter().all(|device| holds[device.0 as usize].is_none());
        let (granted, waiting) = std::mem::take(&mut self.waiting).into_iter().partition(|(_, devices)| idle(devices));
        self.waiting = waiting;
        let granted: Vec<(Holder, Vec<DeviceIndex>)> = granted;
        for (holder, devices) in &granted {
            self.take(*holder, devices);
        }
        granted.into_iter().map(|(holder, _)| holder).collect()
    }

    fn take(&mut self, holder: Holder, devices: &[DeviceIndex]) {
        for device in devices {
            self.holds[device.0 as usize] = Some(Hold { holder, stopping: false });
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

    fn attempt(n: u32) -> Holder {
        Holder::Attempt(key(n))
    }

    fn help(n: u32, device: u32) -> Holder {
        Holder::Help(key(n), DeviceIndex(device))
    }

    fn on(devices: &[u32]) -> Vec<DeviceIndex> {
        devices.iter().copied().map(DeviceIndex).collect()
    }

    fn busy(device: u32, holder: Holder) -> Refusal {
        Refusal::Busy { device: DeviceIndex(device), holder }
    }

    /// All that it has.
    fn release(devices: &mut Devices, holder: Holder) -> Vec<Holder> {
        let held = devices.held(holder);
        held.into_iter().flat_map(|device| devices.release(holder, device)).collect()
    }

    #[test]
    fn a_lease_gets_all_its_devices_or_none() {
        let mut devices = Devices::new(3);
        assert_eq!(devices.reserve(attempt(1), &on(&[1])), Ok(Reserve::Granted));
        assert_eq!(devices.reserve(attempt(2), &on(&[0, 1, 2])), Err(busy(1, attempt(1))));
        // Nothing was kept by the refused lease.
        assert_eq!(devices.reserve(attempt(3), &on(&[0, 2])), Ok(Reserve::Granted));
    }

    #[test]
    fn a_lease_that_makes_no_sense_is_refused_by_name() {
        let mut devices = Devices::new(2);
        assert_eq!(devices.reserve(attempt(1), &[]), Err(Refusal::NoDevice));
        assert_eq!(devices.reserve(attempt(1), &on(&[1, 1])), Err(Refusal::Repeated(DeviceIndex(1))));
        let unknown = Refusal::Unknown { device: DeviceIndex(2), count: 2 };
        assert_eq!(devices.reserve(attempt(1), &on(&[0, 2])), Err(unknown));
        assert_eq!(devices.reserve(attempt(1), &on(&[0, 1])), Ok(Reserve::Granted));
    }

    #[test]
    fn a_device_that_is_being_aborted_may_be_queued_for_once() {
        let mut devices = Devices::new(2);
        devices.reserve(attempt(1), &on(&[0])).unwrap();
        assert!(!devices.abort(attempt(1)));
        assert_eq!(devices.reserve(attempt(2), &on(&[0, 1])), Ok(Reserve::Waiting));
        assert_eq!(devices.reserve(attempt(3), &on(&[0])), Err(busy(0, attempt(2))));
        let overtaken = devices.reserve(attempt(3), &on(&[1]));
        assert_eq!(overtaken, Err(busy(1, attempt(2))), "a gang in the queue is not overtaken");
        assert_eq!(release(&mut devices, attempt(1)), [attempt(2)]);
        assert!(!devices.abort(attempt(2)));
        assert_eq!(devices.reserve(attempt(4), &on(&[1])), Ok(Reserve::Waiting));
        assert!(devices.abort(attempt(4)), "it was only queued");
        assert_eq!(release(&mut devices, attempt(2)), []);
    }

    #[test]
    fn an_attempt_may_give_back_some_devices_and_go_on_with_others() {
        let mut devices = Devices::new(3);
        devices.reserve(attempt(1), &on(&[0, 1, 2])).unwrap();
        assert_eq!([0, 2].map(|device| devices.release(attempt(1), DeviceIndex(device))), [vec![], vec![]]);
        assert_eq!(devices.held(attempt(1)), on(&[1]));
        assert_eq!(devices.reserve(attempt(2), &on(&[0, 2])), Ok(Reserve::Granted));
        assert_eq!(devices.reserve(attempt(3), &on(&[1])), Err(busy(1, attempt(1))));
        // What it has given back is not its own any more.
        assert_eq!(devices.release(attempt(1), DeviceIndex(0)), []);
        assert_eq!(devices.reserve(attempt(3), &on(&[0])), Err(busy(0, attempt(2))));
        assert_eq!(devices.release(attempt(1), DeviceIndex(1)), []);
        assert_eq!(devices.reserve(attempt(3), &on(&[1])), Ok(Reserve::Granted));
    }

    #[test]
    fn an_attempt_and_each_device_that_helps_it_are_apart() {
        let mut devices = Devices::new(3);
        devices.reserve(attempt(1), &on(&[0])).unwrap();
        devices.reserve(help(1, 1), &on(&[1])).unwrap();
        devices.reserve(help(1, 2), &on(&[2])).unwrap();
        devices.release(help(1, 1), DeviceIndex(1));
        assert_eq!(devices.reserve(attempt(2), &on(&[0])), Err(busy(0, attempt(1))));
        assert_eq!(devices.reserve(attempt(2), &on(&[2])), Err(busy(2, help(1, 2))));
        devices.abort(help(1, 2));
        assert_eq!(devices.reserve(attempt(2), &on(&[1, 2])), Ok(Reserve::Waiting));
        assert_eq!(devices.release(help(1, 2), DeviceIndex(2)), [attempt(2)]);
        // And the other way round.
        devices.abort(attempt(1));
        assert_eq!(devices.reserve(help(3, 0), &on(&[0])), Ok(Reserve::Waiting));
        assert_eq!(devices.release(attempt(1), DeviceIndex(0)), [help(3, 0)]);
    }

    proptest! {
        #[test]
        fn no_device_is_ever_held_twice_and_none_is_lost(
            steps in prop::collection::vec(
                (0..5u8, prop::collection::vec(0..5u32, 0..4), any::<prop::sample::Index>()), 1..100)
        ) {
            let mut devices = Devices::new(4);
            let mut held: HashMap<Holder, Vec<DeviceIndex>> = HashMap::new();
            let mut queued: HashMap<Holder, Vec<DeviceIndex>> = HashMap::new();
            let mut next = 0;
            for (step, wanted, pick) in steps {
                let mut holders: Vec<Holder> = held.keys().chain(queued.keys()).copied().collect();
                holders.sort_by_key(|holder| format!("{holder:?}"));
                let picked = (!holders.is_empty()).then(|| holders[pick.index(holders.len())]);
                let mut granted = Vec::new();
                match (step, picked) {
                    (0 | 1, _) => {
                        next += 1;
                        let first = wanted.first().copied().unwrap_or(0);
                        let (holder, wanted) = match step {
                            0 => (attempt(next), on(&wanted)),
                            _ => (help(next / 2, first), on(&[first])),
                        };
                        if held.contains_key(&holder) || queued.contains_key(&holder) {
                            continue;
                        }
                        match devices.reserve(holder, &wanted) {
                            Ok(Reserve::Granted) => { held.insert(holder, wanted); }
                            Ok(Reserve::Waiting) => { queued.insert(holder, wanted); }
                            Err(_) => {}
                        }
                    }
                    (2, Some(holder)) => {
                        prop_assert_eq!(devices.abort(holder), queued.remove(&holder).is_some());
                    }
                    (3, Some(holder)) if held.remove(&holder).is_some() => {
                        granted = release(&mut devices, holder);
                    }
                    (4, Some(holder)) => {
                        if let Some(mine) = held.get_mut(&holder) {
                            let back = wanted.first().copied().map_or(DeviceIndex(9), DeviceIndex);
                            mine.retain(|device| *device != back);
                            granted = devices.release(holder, back);
                        }
                    }
                    _ => {}
                }
                for granted in granted {
                    let devices = queued.remove(&granted).expect("it was queued");
                    held.insert(granted, devices);
                }
                let mut taken: Vec<DeviceIndex> = held.values().flatten().copied().collect();
                taken.sort();
                let mut distinct = taken.clone();
                distinct.dedup();
                prop_assert_eq!(taken, distinct);
            }
            // Once everybody has let go, everything is free.
            while let Some(&holder) = held.keys().next() {
                held.remove(&holder);
                for granted in release(&mut devices, holder) {
                    held.insert(granted, queued.remove(&granted).expect("it was queued"));
                }
            }
            prop_assert!(queued.is_empty());
            prop_assert_eq!(devices.reserve(attempt(next + 1), &on(&[0, 1, 2, 3])), Ok(Reserve::Granted));
        }
    }
}
