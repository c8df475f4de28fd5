//! Devices that decode for an attempt of any node. The attempt's node asks once its latent is finished; it is answered
//! at once, and from then on the devices that help are busy until their own nodes do not list them any more. None of
//! this is ever a row: a scheduler that starts anew learns it from the nodes, and a helper that is lost is the
//! attempt's business, which gives its tiles to others.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use farm_core::id::{AttemptKey, BootId, DeviceIndex, NodeId};
use farm_core::wire::to_node::{HelpDecode, ToNode};
use farm_core::wire::to_scheduler::Helping;

use super::effects::{Effects, devices_text};
use super::farm::{Farm, Hands, Help, Lease, Node, Slot, Stopping};
use super::hands::{self, Stock, hands};

/// Longest URL or token that is passed on.
const MAX_ADDRESS: usize = 1024;
/// Helpers that the job's log names.
const NAMED: usize = 4;

/// A device of any node.
type Place = (NodeId, DeviceIndex);

/// An attempt's wish for devices that decode its clip.
pub(super) struct Want {
    pub key: AttemptKey,
    pub round: u32,
    pub tiles: u32,
    pub url: String,
    pub token: String,
}

impl Farm {
    /// Answers, or repeats its answer.
    pub(super) fn on_want_hands(&mut self, id: &NodeId, boot: BootId, want: Want, fx: &mut Effects) {
        let key = want.key;
        // An attempt without lease is told to stop when the node lists it.
        let Some(lease) = self.lease(&key).filter(|lease| lease.node == *id && lease.boot == boot) else { return };
        let hands = match &lease.hands {
            Some(hands) if want.round < hands.round => return,
            Some(hands) if want.round == hands.round => hands.clone(),
            _ => self.lend_hands(lease.clone(), want, fx),
        };
        fx.send(id, boot, ToNode::Hands { key, round: hands.round, keep: hands.keep, helpers: hands.helpers });
    }

    /// Decides who decodes, all at once, and tells those who help.
    fn lend_hands(&mut self, lease: Lease, want: Want, fx: &mut Effects) -> Hands {
        let Want { key, round, tiles, url, token } = want;
        let hands::Hands { keep, helpers } =
            hands(tiles as usize, self.stock(&lease, (tiles as usize).max(1), &url, &token));
        if let Some(text) = hands_text(tiles, &keep, &helpers) {
            fx.log(key.job, Some(key.attempt), text);
        }
        for (id, device) in &helpers {
            let Some(node) = self.nodes.get_mut(id) else { continue };
            let clip = lease.clip.clone();
            let help = HelpDecode {
                key,
                round,
                device: *device,
                model: clip.model,
                model_hash: clip.model_hash,
                spec_json: clip.spec_json,
                url: url.clone(),
                token: token.clone(),
            };
            fx.send(id, node.boot, ToNode::Help(Box::new(help.clone())));
            let awaited = Some((self.now, help));
            node.devices[device.0 as usize].slot = Slot::Helping(Box::new(Help { key, since: self.now, awaited }));
        }
        let hands = Hands { round, keep, helpers: helpers.len() as u32 };
        if let Some(lease) = self.lease_mut(&key) {
            lease.hands = Some(hands.clone());
            lease.helpers.extend(helpers);
        }
        hands
    }

    /// What there is for the decode of an attempt. Nobody is told to help where helpers have no way to the attempt.
    fn stock(&self, lease: &Lease, tiles: usize, url: &str, token: &str) -> Stock<Place> {
        // Those that an earlier answer did not name are given back, whether the node has said so or not.
        let kept = |device: &DeviceIndex| lease.hands.as_ref().is_none_or(|hands| hands.keep.contains(device));
        let own = lease.devices.iter().copied().filter(kept).collect();
        let mut stock = Stock {
            decoders: Vec::new(),
            spare: Vec::new(),
            wanted: Vec::new(),
            own,
            own_decode: self.nodes.get(&lease.node).is_some_and(|node| node.roles.decode),
            own_wanted: self.nodes.get(&lease.node).is_some_and(|node| self.is_wanted(node)),
        };
        if url.is_empty() || url.len() > MAX_ADDRESS || token.len() > MAX_ADDRESS {
            return stock;
        }
        let mut wanted = HashMap::new();
        let own = self.nodes.get_key_value(&lease.node);
        let others = self.nodes.iter().filter(|(id, _)| **id != lease.node);
        for (id, node) in own.into_iter().chain(others).filter(|(_, node)| node.roles.decode) {
            let wanted = *wanted.entry(node.group).or_insert_with(|| self.is_wanted(node));
            let (devices, most) = match (node.roles.denoise, wanted) {
                (false, _) => (&mut stock.decoders, tiles),
                (true, false) => (&mut stock.spare, tiles),
                (true, true) => (&mut stock.wanted, 1),
            };
            // A farm has many nodes, and a clip few tiles.
            if devices.len() >= most || !node.devices.iter().any(|device| device.slot == Slot::Free) {
                continue;
            }
            let has_model = node.models.get(lease.clip.model.as_str()).map(|model| &model.hash);
            if self.is_alive(node) && has_model == Some(&lease.clip.model_hash) && self.closed(id, node).is_none() {
                devices.extend(node.free_devices().map(|device| (id.clone(), device)).take(most));
            }
        }
        stock
    }

    /// Whether a job waits that the node could take.
    fn is_wanted(&self, node: &Node) -> bool {
        let only_model = self.only_model();
        !self.paused
            && self.classes.waiting().any(|(class, _)| {
                let class = self.classes.get(class);
                class.model.as_ref().or(only_model.as_ref()).is_some_and(|model| node.can_render(model))
            })
    }

    /// A registered node lists the devices that help.
    pub(super) fn on_helping(&mut self, id: &NodeId, boot: BootId, helping: &[Helping], fx: &mut Effects) {
        let listed: HashSet<(AttemptKey, DeviceIndex)> = helping.iter().map(|help| (help.key, help.device)).collect();
        self.chase_helpers(id, boot, &listed, fx);
        let (now, mut adopted) = (self.now, Vec::new());
        for Helping { key, device } in helping {
            let running = self.lease(key).is_some();
            let Some(node) = self.nodes.get_mut(id) else { return };
            let known = match node.devices.get_mut(device.0 as usize).map(|device| &mut device.slot) {
                Some(Slot::Helping(help)) if help.key == *key => {
                    help.awaited = None;
                    true
                }
                // Lent by the scheduler that was here before, or given up too early: it is busy at any rate.
                Some(slot @ Slot::Free) => {
                    *slot = Slot::Helping(Box::new(Help { key: *key, since: now, awaited: None }));
                    adopted.push((*key, *device));
                    true
                }
                _ => false,
            };
            if !known || !running {
                self.counters.strays_dismissed += 1;
                let stop = self.next_stop();
                fx.send(id, boot, ToNode::Dismiss { key: *key, device: *device, stop });
            }
        }
        for (key, device) in adopted {
            if let Some(lease) = self.lease_mut(&key) {
                let helper = (id.clone(), device);
                // It may be there still, from before its node was lost for a while.
                if !lease.helpers.contains(&helper) {
                    lease.helpers.push(helper);
                }
            }
        }
    }

    /// Helpers that the node does not list: the command may be on the way, but not for ever; else they have ended.
    fn chase_helpers(
        &mut self,
        id: &NodeId,
        boot: BootId,
        listed: &HashSet<(AttemptKey, DeviceIndex)>,
        fx: &mut Effects,
    ) {
        let (now, span) = (self.now, self.limits.start);
        let Some(node) = self.nodes.get(id) else { return };
        let (mut ended, mut given_up) = (Vec::new(), Vec::new());
        for (i, device) in node.devices.iter().enumerate() {
            let Slot::Helping(help) = &device.slot else { continue };
            let index = DeviceIndex(i as u32);
            if listed.contains(&(help.key, index)) {
                continue;
            }
            match &help.awaited {
                Some((since, command)) if self.lease(&help.key).is_some() && now.since(*since) < span => {
                    fx.send(id, boot, ToNode::Help(Box::new(command.clone())));
                }
                Some(_) => given_up.push((i, help.key)),
                None => ended.push(i),
            }
        }
        for i in ended {
            self.end_help(id, i);
        }
        // The command may be on the way yet, or obeyed.
        for (i, key) in given_up {
            let stop = self.next_stop();
            fx.send(id, boot, ToNode::Dismiss { key, device: DeviceIndex(i as u32), stop });
            self.end_help(id, i);
            if let Some(node) = self.nodes.get_mut(id) {
                node.devices[i].slot = Slot::Stopping(Box::new(Stopping { key, command: stop, helps: true }));
            }
        }
    }

    /// A device has stopped helping.
    pub(super) fn end_help(&mut self, id: &NodeId, index: usize) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        let slot = std::mem::replace(&mut node.devices[index].slot, Slot::Free);
        self.replan = true;
        let (Slot::Helping(help), now) = (slot, self.now) else { return };
        if let Some(lease) = self.lease_mut(&help.key) {
            let helper = (id.clone(), DeviceIndex(index as u32));
            if lease.helpers.contains(&helper) {
                lease.helpers.retain(|known| *known != helper);
                lease.bill.used += now.since(help.since);
            }
        }
    }

    /// How long a device has helped the attempt, if it does.
    pub(super) fn helper_time(&self, key: &AttemptKey, (id, device): &Place) -> Duration {
        match self.nodes.get(id).and_then(|node| node.devices.get(device.0 as usize)).map(|device| &device.slot) {
            Some(Slot::Helping(help)) if help.key == *key => self.now.since(help.since),
            _ => Duration::ZERO,
        }
    }

    /// The attempt has ended. Its helpers would notice, but where the network is cut that takes long.
    pub(super) fn dismiss_helpers(&mut self, key: AttemptKey, helpers: &[Place], fx: &mut Effects) {
        for (id, device) in helpers {
            let stop = self.next_stop();
            let Some(node) = self.nodes.get(id) else { continue };
            let slot = node.devices.get(device.0 as usize).map(|device| &device.slot);
            if matches!(slot, Some(Slot::Helping(help)) if help.key == key) {
                fx.send(id, node.boot, ToNode::Dismiss { key, device: *device, stop });
            }
        }
    }
}

/// `decode of 18 tiles on device 0 here and 3 helpers: node-b 0, node-b 1, node-c 0`; nothing of no hands.
fn hands_text(tiles: u32, keep: &[DeviceIndex], helpers: &[Place]) -> Option<String> {
    let tiles = if tiles == 1 { "1 tile".to_owned() } else { format!("{tiles} tiles") };
    let here = match keep {
        [] => None,
        [device] => Some(format!("device {device} here")),
        devices => Some(format!("devices {} here", devices_text(devices))),
    };
    let named: Vec<String> = helpers.iter().take(NAMED).map(|(id, device)| format!("{id} {device}")).collect();
    let more = if helpers.len() > NAMED { ", …" } else { "" };
    let there = match helpers.len() {
        0 => None,
        1 => Some(format!("1 helper: {}", named.join(", "))),
        count => Some(format!("{count} helpers: {}{more}", named.join(", "))),
    };
    let on: Vec<String> = here.into_iter().chain(there).collect();
    (!on.is_empty()).then(|| format!("decode of {tiles} on {}", on.join(" and ")))
}
