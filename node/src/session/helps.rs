//! Which devices of this node decode for other attempts.

use std::collections::VecDeque;

use farm_core::id::{AttemptKey, DeviceIndex};
use farm_core::wire::to_node::HelpDecode;
use farm_core::wire::to_scheduler::Helping;

use super::events::Action;

/// Ended helps that are remembered, so that a late repeat of their command is not taken for a new one.
const REMEMBERED: usize = 1024;

#[derive(Debug)]
struct Help {
    key: AttemptKey,
    device: DeviceIndex,
    round: u32,
    dismissed: bool,
}

#[derive(Debug, Default)]
pub struct Helps {
    held: Vec<Help>,
    /// With the round in which the device helped: it may be asked again in a later one.
    ended: VecDeque<(AttemptKey, DeviceIndex, u32)>,
}

impl Helps {
    /// True if the command is new; then the device counts as helping. At most `limit` are taken on.
    pub fn begin(&mut self, help: &HelpDecode, limit: usize) -> bool {
        let HelpDecode { key, device, round, .. } = *help;
        let mut ended = self.ended.iter().filter(|(k, d, _)| *k == key && *d == device);
        if self.find(key, device).is_some() || ended.any(|(.., ended)| *ended >= round) {
            return false;
        }
        if self.held.len() >= limit {
            // The scheduler repeats what is not listed.
            tracing::warn!(%key, %device, "not helped: too many helps are held already");
            return false;
        }
        self.held.push(Help { key, device, round, dismissed: false });
        true
    }

    /// True if the device helped the attempt until now.
    pub fn end(&mut self, key: AttemptKey, device: DeviceIndex) -> bool {
        let Some(at) = self.find(key, device) else { return false };
        let Help { round, .. } = self.held.swap_remove(at);
        self.ended.push_back((key, device, round));
        if self.ended.len() > REMEMBERED {
            self.ended.pop_front();
        }
        true
    }

    /// The device is to stop. It counts as helping until it has.
    pub fn dismiss(&mut self, key: AttemptKey, device: DeviceIndex, out: &mut Vec<Action>) {
        if let Some(at) = self.find(key, device) {
            self.held[at].dismiss(out);
        }
    }

    pub fn dismiss_all(&mut self, out: &mut Vec<Action>) {
        self.held.iter_mut().for_each(|help| help.dismiss(out));
    }

    pub fn listed(&self) -> Vec<Helping> {
        self.held.iter().map(|help| Helping { key: help.key, device: help.device }).collect()
    }

    fn find(&self, key: AttemptKey, device: DeviceIndex) -> Option<usize> {
        self.held.iter().position(|help| help.key == key && help.device == device)
    }
}

impl Help {
    /// Once: the repeats say nothing new.
    fn dismiss(&mut self, out: &mut Vec<Action>) {
        if !std::mem::replace(&mut self.dismissed, true) {
            out.push(Action::Dismiss { key: self.key, device: self.device });
        }
    }
}
