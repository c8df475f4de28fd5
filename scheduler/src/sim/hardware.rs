//! The devices of a node, and who has them: what really happens, whatever the scheduler believes.

use farm_core::id::{AttemptKey, DeviceIndex};

use super::Ms;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    Attempt(AttemptKey),
    Help(AttemptKey, DeviceIndex),
}

#[derive(Clone, Copy, Debug)]
pub struct Hold {
    pub holder: Holder,
    /// It was told to stop, and does at its next step.
    pub stopping: bool,
    /// Its command came so late that the scheduler had given it up before.
    pub late: bool,
    pub since: Ms,
}

#[derive(Clone, Debug)]
struct Waiting {
    holder: Holder,
    devices: Vec<DeviceIndex>,
    late: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Reserve {
    Granted,
    /// For devices whose holders were told to stop.
    Queued,
    /// Somebody has one of them and was not told to stop; `true` if that is nobody's fault, because a command was late.
    Busy(bool),
}

#[derive(Clone, Debug, Default)]
pub struct Devices {
    pub holds: Vec<Option<Hold>>,
    waiting: Vec<Waiting>,
    /// Until when each is broken.
    pub broken: Vec<Ms>,
}

impl Devices {
    pub fn new(count: usize) -> Self {
        Self { holds: vec![None; count], waiting: Vec::new(), broken: vec![0; count] }
    }

    /// All that ran on them is dead.
    pub fn clear(&mut self) {
        self.holds.fill(None);
        self.waiting.clear();
    }

    /// All of `devices`, or a place in the queue for them, or none.
    pub fn reserve(&mut self, holder: Holder, devices: &[DeviceIndex], late: bool, now: Ms) -> Reserve {
        let mut free = true;
        for device in devices {
            match self.holds.get(device.0 as usize) {
                None => return Reserve::Busy(false),
                Some(Some(hold)) if !hold.stopping => return Reserve::Busy(hold.late || late),
                Some(Some(_)) => free = false,
                Some(None) => {}
            }
            if let Some(other) = self.waiting.iter().find(|other| other.devices.contains(device)) {
                return Reserve::Busy(other.late || late);
            }
        }
        if free {
            self.take(holder, devices, late, now);
            return Reserve::Granted;
        }
        self.waiting.push(Waiting { holder, devices: devices.to_vec(), late });
        Reserve::Queued
    }

    fn take(&mut self, holder: Holder, devices: &[DeviceIndex], late: bool, now: Ms) {
        for device in devices {
            self.holds[device.0 as usize] = Some(Hold { holder, stopping: false, late, since: now });
        }
    }

    /// Who waits, for people.
    pub fn waiting(&self) -> String {
        let waiting =
            self.waiting.iter().map(|waiting| format!("{:?} waits for {:?}", waiting.holder, waiting.devices));
        waiting.collect::<Vec<_>>().join(", ")
    }

    /// True if it was only queued, and is gone.
    pub fn stop(&mut self, holder: Holder) -> bool {
        let queued = self.waiting.len();
        self.waiting.retain(|waiting| waiting.holder != holder);
        self.holds.iter_mut().flatten().filter(|hold| hold.holder == holder).for_each(|hold| hold.stopping = true);
        self.waiting.len() < queued
    }

    /// Those that the holder has.
    pub fn of(&self, holder: Holder) -> impl Iterator<Item = (DeviceIndex, &Hold)> {
        let holds = (0..).zip(&self.holds);
        holds
            .filter_map(|(i, hold)| Some((DeviceIndex(i), hold.as_ref()?)))
            .filter(move |(_, hold)| hold.holder == holder)
    }

    /// The holder lets go of all but `keep`. Gives the milliseconds that it held those, and who gets devices now.
    pub fn release(&mut self, holder: Holder, keep: &[DeviceIndex], now: Ms) -> (Ms, Vec<Holder>) {
        let mut held = 0;
        if keep.is_empty() {
            self.waiting.retain(|waiting| waiting.holder != holder);
        }
        for (i, hold) in self.holds.iter_mut().enumerate() {
            if let Some(Hold { holder: of, since, .. }) = hold
                && *of == holder
                && !keep.contains(&DeviceIndex(i as u32))
            {
                held += now.saturating_sub(*since);
                *hold = None;
            }
        }
        let holds = &self.holds;
        let idle = |waiting: &Waiting| waiting.devices.iter().all(|device| holds[device.0 as usize].is_none());
        let (granted, waiting): (Vec<Waiting>, Vec<Waiting>) =
            std::mem::take(&mut self.waiting).into_iter().partition(idle);
        self.waiting = waiting;
        for Waiting { holder, devices, late } in &granted {
            self.take(*holder, devices, *late, now);
        }
        (held, granted.into_iter().map(|granted| granted.holder).collect())
    }

    pub fn is_idle(&self) -> bool {
        self.holds.iter().all(Option::is_none) && self.waiting.is_empty()
    }
}
