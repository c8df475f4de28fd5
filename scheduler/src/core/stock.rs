//! The nodes that can start clips, by kind and by how many of their devices are free: finds one for a gang without
//! looking at all of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use farm_core::id::NodeId;
use farm_core::parallel::cost::{DeviceRates, LinkRates, Site};
use farm_core::wire::to_scheduler::Roles;

use super::farm::NodeModel;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupIx(pub u32);

/// What all nodes of a group have in common.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    pub devices: usize,
    /// Name of the devices; of several names, the first device's.
    pub device: Arc<str>,
    /// Rounded with [`coarse`], so that nodes of one make are of one group.
    pub site: Option<Site>,
    pub models: Arc<BTreeMap<Arc<str>, NodeModel>>,
    pub roles: Roles,
}

impl Spec {
    fn key(&self) -> String {
        let models: Vec<_> = self.models.iter().map(|(name, model)| (name, &model.hash)).collect();
        format!("{} {:?} {:?} {:?} {:?}", self.devices, self.device, self.site, self.roles.names(), models)
    }

    /// Whether its clips are better spread over the nodes: devices of one host share its memory.
    fn spreads(&self) -> bool {
        self.site.is_none_or(|site| site.device.shared_weights)
    }
}

/// How a node that can start clips is found: by the model that it ran last, and by its free devices (at least one).
pub type Filed = (Option<Arc<str>>, usize);

type ByFree = BTreeMap<usize, BTreeSet<NodeId>>;

#[derive(Debug)]
pub struct Group {
    pub spec: Spec,
    /// Joined nodes, whatever their state.
    pub nodes: BTreeSet<NodeId>,
    /// Nodes that can start clips, by the model that they ran last.
    warm: BTreeMap<Option<Arc<str>>, ByFree>,
    /// How many of those have so many devices free.
    free: Vec<usize>,
}

impl Group {
    /// How many of the nodes that can start clips have `i` devices free, at index i.
    pub fn free(&self) -> &[usize] {
        &self.free
    }

    /// Devices of the largest gang that could start.
    pub fn most_free(&self) -> usize {
        self.free.iter().rposition(|nodes| *nodes > 0).unwrap_or(0)
    }

    /// A node with at least `devices` free. Where clips are better spread, one with most of them; then one that has just
    /// run the model; then one that has run none. `legal` may turn nodes down.
    pub fn find<'a>(&'a self, devices: usize, model: &str, legal: impl Fn(&NodeId) -> bool) -> Option<Found<'a>> {
        let spreads = self.spec.spreads();
        let found = |(warm, by_free): (&Option<Arc<str>>, &'a ByFree)| -> Option<Found<'a>> {
            let warm = warm.as_deref() == Some(model);
            let of = |(free, nodes): (&usize, &'a BTreeSet<NodeId>)| {
                nodes.iter().find(|id| legal(id)).map(|node| Found { node, free: *free, warm })
            };
            let mut enough = by_free.range(devices..);
            if spreads { enough.rev().find_map(of) } else { enough.find_map(of) }
        };
        let own = self.warm.iter().filter(|(warm, _)| warm.as_deref() == Some(model)).find_map(found);
        if own.is_some() && !spreads {
            return own;
        }
        let mut others = self.warm.iter().filter(|(warm, _)| warm.as_deref() != Some(model)).filter_map(found);
        let other = if spreads {
            others.reduce(|best, next| if next.free > best.free { next } else { best })
        } else {
            others.next()
        };
        match (own, other) {
            (Some(own), Some(other)) => Some(if other.free > own.free { other } else { own }),
            (own, other) => own.or(other),
        }
    }
}

/// A node for a gang.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    pub node: &'a NodeId,
    pub free: usize,
    /// It has just run the model.
    pub warm: bool,
}
/// All groups.
#[derive(Debug, Default)]
pub struct Stock {
    groups: Vec<Group>,
    by_key: HashMap<String, GroupIx>,
    /// Grows with every change of what groups there are.
    version: u64,
}

impl Stock {
    pub fn version(&self) -> u64 {
        self.version
    }

    pub fn group(&self, ix: GroupIx) -> &Group {
        &self.groups[ix.0 as usize]
    }

    /// Groups that have nodes.
    pub fn groups(&self) -> impl Iterator<Item = (GroupIx, &Group)> {
        let groups = self.groups.iter().enumerate().filter(|(_, group)| !group.nodes.is_empty());
        groups.map(|(i, group)| (GroupIx(i as u32), group))
    }

    /// A node joins; it cannot start clips before it is filed.
    pub fn join(&mut self, id: &NodeId, spec: Spec) -> GroupIx {
        let key = spec.key();
        let ix = match self.by_key.get(&key) {
            Some(ix) => *ix,
            None => {
                let vacant = self.groups.iter().position(|group| group.nodes.is_empty());
                let free = vec![0; spec.devices + 1];
                let group = Group { spec, nodes: BTreeSet::new(), warm: BTreeMap::new(), free };
                let ix = match vacant {
                    Some(i) => {
                        self.by_key.retain(|_, ix| ix.0 as usize != i);
                        self.groups[i] = group;
                        GroupIx(i as u32)
                    }
                    None => {
                        self.groups.push(group);
                        GroupIx(self.groups.len() as u32 - 1)
                    }
                };
                self.by_key.insert(key, ix);
                ix
            }
        };
        let group = &mut self.groups[ix.0 as usize];
        if group.nodes.is_empty() {
            self.version += 1;
        }
        group.nodes.insert(id.clone());
        ix
    }

    /// A node that is not filed leaves.
    pub fn leave(&mut self, id: &NodeId, ix: GroupIx) {
        let group = &mut self.groups[ix.0 as usize];
        group.nodes.remove(id);
        if group.nodes.is_empty() {
            self.version += 1;
        }
    }

    /// Files a node under `new`, or takes it out. `filed` is where it is filed.
    pub fn file(&mut self, id: &NodeId, ix: GroupIx, filed: &mut Option<Filed>, new: Option<Filed>) {
        if *filed == new {
            return;
        }
        let group = &mut self.groups[ix.0 as usize];
        let mut own = None;
        if let Some((warm, free)) = filed.take()
            && let Some(by_free) = group.warm.get_mut(&warm)
        {
            if let Some(nodes) = by_free.get_mut(&free) {
                own = nodes.take(id);
                group.free[free] -= own.is_some() as usize;
                if nodes.is_empty() {
                    by_free.remove(&free);
                }
            }
            if by_free.is_empty() {
                group.warm.remove(&warm);
            }
        }
        if let Some((warm, free)) = &new {
            let id = own.unwrap_or_else(|| id.clone());
            group.warm.entry(warm.clone()).or_default().entry(*free).or_default().insert(id);
            group.free[*free] += 1;
        }
        *filed = new;
    }

    /// The groups have the nodes that say so, each filed where it says. `node` gives its group and where it is filed.
    pub fn check(&self, node: impl Fn(&NodeId) -> Option<(GroupIx, Option<Filed>)>) -> Result<(), String> {
        for (i, group) in self.groups.iter().enumerate() {
            let mut free = vec![0; group.free.len()];
            for id in &group.nodes {
                match node(id) {
                    Some((ix, filed)) if ix.0 as usize == i => {
                        let Some((warm, devices)) = filed else { continue };
                        let place = group.warm.get(&warm).and_then(|by_free| by_free.get(&devices));
                        if !place.is_some_and(|nodes| nodes.contains(id)) {
                            return Err(format!("node {id} is not filed under {warm:?} {devices}"));
                        }
                        free[devices] += 1;
                    }
                    _ => return Err(format!("node {id} is not of group {i}")),
                }
            }
            let filed: usize = group.warm.values().flat_map(BTreeMap::values).map(BTreeSet::len).sum();
            if free != group.free || filed != free.iter().sum::<usize>() {
                return Err(format!("group {i} counts {:?}, {filed} are filed, nodes say {free:?}", group.free));
            }
        }
        Ok(())
    }
}

/// Rates rounded to steps of a sixteenth of a power of two, downwards: nodes of one make differ by less.
pub fn coarse(site: Site) -> Site {
    let round =
        |rate: f64| if rate.is_normal() && rate > 0.0 { ((rate.log2() * 16.0).floor() / 16.0).exp2() } else { rate };
    let link = |link: LinkRates| LinkRates { bandwidth: round(link.bandwidth), latency: round(link.latency) };
    let DeviceRates { linear, attention, memory, bandwidth, value_bytes, shared_weights } = site.device;
    let device = DeviceRates {
        linear: round(linear),
        attention: round(attention),
        memory: round(memory),
        bandwidth: round(bandwidth),
        value_bytes,
        shared_weights,
    };
    Site { device, inside: link(site.inside), between: link(site.between), ..site }
}
