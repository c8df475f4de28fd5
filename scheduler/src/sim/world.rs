//! The simulated world: what is due when, and everything in it.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};

use farm_core::id::{AttemptKey, BootId, DeviceIndex, JobId, TenantId};
use farm_core::wire::Envelope;
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::ToScheduler;

use super::Ms;
use super::bucket::Bucket;
use super::client::{Call, Clients};
use super::hardware::Holder;
use super::net::Connection;
use super::node::Node;
use super::plan::{Fault, Plan};
use super::random::Random;
use super::scheduler::{Inbound, Scheduler};
use super::settle::Settle;
use super::store::Store;

/// Something that is due. Numbers of processes and reigns tell what is left of earlier ones.
pub enum Due {
    Tick {
        scheduler: usize,
        reign: u32,
    },
    Beat {
        scheduler: usize,
        reign: u32,
    },
    Campaign {
        scheduler: usize,
    },
    /// The database is through with a transaction.
    Written {
        scheduler: usize,
        reign: u32,
    },
    Reign {
        scheduler: usize,
        reign: u32,
    },
    SchedulerUp {
        scheduler: usize,
    },
    Inbound {
        scheduler: usize,
        reign: u32,
        what: Box<Inbound>,
    },
    Up {
        scheduler: usize,
        reign: u32,
        envelope: Box<Envelope<ToScheduler>>,
    },
    Down {
        node: usize,
        boots: u32,
        envelope: Box<Envelope<ToNode>>,
    },
    Wake {
        node: usize,
        boots: u32,
        serial: u64,
    },
    Dialed {
        node: usize,
        boots: u32,
        scheduler: usize,
    },
    /// One end of a connection learns that the other is gone.
    Closed {
        connection: usize,
        at_node: bool,
    },
    Stage {
        node: usize,
        boots: u32,
        key: AttemptKey,
        turn: u32,
    },
    /// A holder that was told to stop does.
    Stopped {
        node: usize,
        boots: u32,
        holder: Holder,
    },
    /// The helper notices that the decode is over.
    HelpOver {
        node: usize,
        boots: u32,
        key: AttemptKey,
        device: DeviceIndex,
    },
    NodeUp {
        node: usize,
        boots: u32,
    },
    Fault(Fault),
    Call(Box<Call>),
    Settle,
}

pub struct Entry {
    at: Ms,
    number: u64,
    due: Due,
}

impl Ord for Entry {
    /// The earliest is the greatest.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Entry {}

/// A broken invariant.
#[derive(Clone, Debug, PartialEq)]
pub struct Broken {
    pub invariant: &'static str,
    pub text: String,
    pub at: Ms,
}

/// What really was of an attempt.
#[derive(Clone, Debug, Default)]
pub struct Truth {
    /// When it was started.
    pub began: Ms,
    /// Device time that has ended, in milliseconds.
    pub held: Ms,
    /// Something happened to it that leaves its bill to estimates.
    pub disturbed: bool,
    /// The decode wants no hands any more.
    pub decoded: bool,
    /// Devices that were told to help it: node, process, device.
    pub helpers: Vec<(usize, u32, DeviceIndex)>,
    /// Devices of its gang and of its helpers.
    pub devices: u64,
}

pub struct World {
    pub plan: Plan,
    pub random: Random,
    pub now: Ms,
    heap: BinaryHeap<Entry>,
    numbers: u64,
    pub store: Store,
    /// Until then the database does not answer.
    pub database_down: Ms,
    pub bucket: Bucket,
    pub schedulers: Vec<Scheduler>,
    pub nodes: Vec<Node>,
    pub connections: Vec<Connection>,
    pub clients: Clients,
    pub settle: Settle,
    pub truth: HashMap<AttemptKey, Truth>,
    pub storm: Ms,
    /// When jobs got their devices whose requests are being loaded.
    pub picked: HashMap<JobId, Ms>,
    /// Since when tenants that have no device wait for nothing but devices.
    pub hungry: BTreeMap<TenantId, Ms>,
    pub broken: Option<Broken>,
    pub counts: BTreeMap<&'static str, u64>,
    /// Of all that happened, in order.
    pub hash: u64,
    pub events: u64,
    pub trace: Option<VecDeque<String>>,
    pub checks: u64,
    /// When a large farm is looked at as a whole again.
    pub next_audit: Ms,
}

/// Lines of a trace that are kept.
const TRACE: usize = 20_000;

pub fn boot_id(node: usize, boots: u32) -> BootId {
    BootId(uuid::Uuid::from_u128(((node as u128 + 1) << 32) | u128::from(boots)))
}

/// Node and number of its process.
pub fn of_boot(boot: BootId) -> (usize, u32) {
    let bits = boot.0.as_u128();
    (((bits >> 32) as usize).wrapping_sub(1), bits as u32)
}

impl World {
    pub fn new(plan: Plan, random: Random, traced: bool) -> Self {
        let nodes: Vec<Node> = plan.nodes.iter().enumerate().map(|(i, plan)| Node::new(i, plan.clone())).collect();
        let schedulers = (0..plan.schedulers).map(|_| Scheduler::new(nodes.len())).collect();
        let settle = Settle::new(&plan);
        let mut world = Self {
            random,
            now: 0,
            heap: BinaryHeap::new(),
            numbers: 0,
            store: Store::default(),
            database_down: 0,
            bucket: Bucket::default(),
            schedulers,
            nodes,
            connections: Vec::new(),
            clients: Clients::default(),
            settle,
            truth: HashMap::new(),
            storm: 0,
            picked: HashMap::new(),
            hungry: BTreeMap::new(),
            broken: None,
            counts: BTreeMap::new(),
            hash: 0xcbf2_9ce4_8422_2325,
            events: 0,
            trace: traced.then(VecDeque::new),
            checks: 0,
            next_audit: 0,
            plan,
        };
        world.prepare();
        world
    }

    fn prepare(&mut self) {
        for scheduler in 0..self.schedulers.len() {
            self.after(10 * scheduler as Ms, Due::Campaign { scheduler });
        }
        let spread = if self.plan.large { 4_000 } else { 1_000 };
        for node in 0..self.nodes.len() {
            let at = self.random.below(spread);
            self.after(at, Due::NodeUp { node, boots: 0 });
        }
        for (at, fault) in std::mem::take(&mut self.plan.faults) {
            self.after(at, Due::Fault(fault));
        }
        self.prepare_clients();
        self.after(self.plan.active, Due::Settle);
    }

    pub fn after(&mut self, delay: Ms, due: Due) {
        self.at(self.now + delay, due);
    }

    pub fn at(&mut self, at: Ms, due: Due) {
        self.numbers += 1;
        self.heap.push(Entry { at: at.max(self.now), number: self.numbers, due });
    }

    /// Runs to the end, or until an invariant is broken.
    pub fn run(&mut self) {
        while self.broken.is_none() && !self.settle.is_over() {
            let Some(Entry { at, due, .. }) = self.heap.pop() else {
                return self.fail("I6", "nothing is due any more, and work is left".to_owned());
            };
            self.now = at;
            self.events += 1;
            self.happen(due);
        }
    }

    pub fn fail(&mut self, invariant: &'static str, text: String) {
        let at = self.now;
        self.note(|| format!("BROKEN {invariant}: {text}"));
        self.broken.get_or_insert(Broken { invariant, text, at });
    }

    pub fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// A line of the trace.
    pub fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            if trace.len() == TRACE {
                trace.pop_front();
            }
            trace.push_back(format!("{:>9.3} {}", self.now as f64 / 1000.0, line()));
        }
    }

    /// The hash goes on with these numbers.
    pub fn mix(&mut self, numbers: &[u64]) {
        for number in numbers {
            self.hash = (self.hash ^ number).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
    }

    /// For whom it is, if that one stands still now: then it is due later.
    fn stands_still(&self, due: &Due) -> Option<Ms> {
        let until = match due {
            Due::Tick { scheduler, .. }
            | Due::Beat { scheduler, .. }
            | Due::Campaign { scheduler }
            | Due::Written { scheduler, .. }
            | Due::Reign { scheduler, .. }
            | Due::Inbound { scheduler, .. }
            | Due::Up { scheduler, .. } => self.schedulers[*scheduler].stopped,
            Due::Closed { connection, at_node } => {
                let Connection { node, scheduler, .. } = self.connections[*connection];
                if *at_node { self.nodes[node].frozen } else { self.schedulers[scheduler].stopped }
            }
            Due::Down { node, .. }
            | Due::Wake { node, .. }
            | Due::Dialed { node, .. }
            | Due::Stage { node, .. }
            | Due::Stopped { node, .. }
            | Due::HelpOver { node, .. } => self.nodes[*node].frozen,
            _ => 0,
        };
        (until > self.now).then_some(until)
    }

    fn happen(&mut self, due: Due) {
        if let Some(until) = self.stands_still(&due) {
            return self.at(until, due);
        }
        match due {
            Due::Tick { scheduler, reign } => self.tick(scheduler, reign),
            Due::Beat { scheduler, reign } => self.beat(scheduler, reign),
            Due::Campaign { scheduler } => self.campaign(scheduler),
            Due::Written { scheduler, reign } => self.written(scheduler, reign),
            Due::Reign { scheduler, reign } => self.reign(scheduler, reign),
            Due::SchedulerUp { scheduler } => self.scheduler_up(scheduler),
            Due::Inbound { scheduler, reign, what } => self.inbound(scheduler, reign, *what),
            Due::Up { scheduler, reign, envelope } => self.arrive_up(scheduler, reign, envelope),
            Due::Down { node, boots, envelope } => self.arrive_down(node, boots, *envelope),
            Due::Wake { node, boots, serial } => {
                if self.nodes[node].is(boots) && self.nodes[node].wake_serial == serial {
                    self.wake(node);
                }
            }
            Due::Dialed { node, boots, scheduler } => self.dialed(node, boots, scheduler),
            Due::Closed { connection, at_node } => self.closed(connection, at_node),
            Due::Stage { node, boots, key, turn } => {
                if self.nodes[node].is(boots) {
                    self.stage_over(node, key, turn);
                }
            }
            Due::Stopped { node, boots, holder } => {
                if self.nodes[node].is(boots) {
                    self.let_go(node, holder, &[]);
                }
            }
            Due::HelpOver { node, boots, key, device } => {
                if self.nodes[node].is(boots) {
                    self.let_go(node, Holder::Help(key, device), &[]);
                }
            }
            Due::NodeUp { node, boots } => {
                if !self.nodes[node].up && self.nodes[node].boots == boots {
                    self.boot(node);
                }
            }
            Due::Fault(fault) => self.inject(fault),
            Due::Call(call) => self.call(*call),
            Due::Settle => self.settle(),
        }
    }
}
