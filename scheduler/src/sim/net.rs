//! The network between nodes and schedulers: connections, and messages that are lost, late, doubled or overtaken.

use farm_core::id::{BootId, Epoch};
use farm_core::wire::Envelope;
use farm_core::wire::to_node::ToNode;
use farm_core::wire::to_scheduler::ToScheduler;

use super::Ms;
use super::node::Link;
use super::scheduler::Inbound;
use super::world::{Due, World, of_boot};

/// A dead connection is noticed by TCP after this.
const DEAD: Ms = 10_000;

#[derive(Clone, Copy, Debug)]
pub struct Connection {
    pub node: usize,
    pub boots: u32,
    pub scheduler: usize,
    pub reign: u32,
    pub at_node: bool,
    pub at_scheduler: bool,
}

/// What becomes of a message: how long each copy of it takes.
struct Fate {
    delays: [Option<Ms>; 2],
}

impl World {
    fn fate(&mut self) -> Fate {
        let mut net = self.plan.net;
        if self.now < self.storm {
            (net.lost, net.doubled, net.late) = (net.lost.max(0.3), net.doubled.max(0.2), net.late.max(0.2));
        }
        if self.random.chance(net.lost) {
            self.count("message lost");
            return Fate { delays: [None, None] };
        }
        let mut delays = [Some(self.delay()), None];
        if self.random.chance(net.late) {
            self.count("message late");
            delays[0] = Some(self.random.between(500, 6_000));
        }
        if self.random.chance(net.doubled) {
            self.count("message doubled");
            delays[1] = Some(self.random.below(3_000));
        }
        Fate { delays }
    }

    pub fn delay(&mut self) -> Ms {
        self.plan.net.delay + self.random.below(self.plan.net.delay + 1)
    }

    /// Node → scheduler, over the connection that the node has.
    pub fn send_up(&mut self, node: usize, body: ToScheduler) {
        let from = &mut self.nodes[node];
        from.seq += 1;
        let (seq, epoch, boot, id) = (from.seq, Epoch(from.epoch), from.boot, from.id.clone());
        let Some(connection) = from.connection() else { return };
        let Connection { scheduler, reign, .. } = self.connections[connection];
        if self.nodes[node].cut_up > self.now {
            return self.count("message in a black hole");
        }
        let envelope = Envelope { epoch, node: id, boot, seq, body };
        let Fate { delays: [first, second] } = self.fate();
        if let Some(delay) = second {
            self.after(delay, Due::Up { scheduler, reign, envelope: Box::new(envelope.clone()) });
        }
        if let Some(delay) = first {
            self.after(delay, Due::Up { scheduler, reign, envelope: Box::new(envelope) });
        }
    }

    pub fn arrive_up(&mut self, scheduler: usize, reign: u32, envelope: Box<Envelope<ToScheduler>>) {
        let (node, _) = of_boot(envelope.boot);
        if self.nodes[node].skewed {
            // Of another version: it does not decode.
            return self.count("message of another version");
        }
        self.inbound(scheduler, reign, Inbound::Frame(envelope));
    }

    /// Scheduler → node, over the newest session of that process.
    pub fn send_down(&mut self, scheduler: usize, boot: BootId, epoch: Epoch, seq: u64, body: ToNode) {
        let (node, boots) = of_boot(boot);
        let Some(connection) = self.schedulers[scheduler].sessions[node] else { return };
        if self.connections[connection].boots != boots {
            return;
        }
        if self.nodes[node].cut_down > self.now {
            return self.count("message in a black hole");
        }
        let envelope = Envelope { epoch, node: self.nodes[node].id.clone(), boot, seq, body };
        let Fate { delays: [first, second] } = self.fate();
        if let Some(delay) = second {
            self.after(delay, Due::Down { node, boots, envelope: Box::new(envelope.clone()) });
        }
        if let Some(delay) = first {
            self.after(delay, Due::Down { node, boots, envelope: Box::new(envelope) });
        }
    }

    pub fn arrive_down(&mut self, node: usize, boots: u32, envelope: Envelope<ToNode>) {
        if self.nodes[node].is(boots) {
            self.hear(node, envelope);
        }
    }

    fn is_cut(&self, node: usize) -> bool {
        let node = &self.nodes[node];
        node.cut_up > self.now || node.cut_down > self.now
    }

    /// The node dials; the outcome comes later.
    pub fn dial(&mut self, node: usize) {
        let scheduler = self.nodes[node].target % self.schedulers.len();
        let takes = match &self.schedulers[scheduler] {
            _ if self.is_cut(node) => 5_000,
            to if to.stopped > self.now => 5_000,
            _ => 2 * self.delay(),
        };
        let boots = self.nodes[node].boots;
        self.nodes[node].link = Link::Dialing;
        self.after(takes, Due::Dialed { node, boots, scheduler });
    }

    pub fn dialed(&mut self, node: usize, boots: u32, scheduler: usize) {
        if !self.nodes[node].is(boots) || !matches!(self.nodes[node].link, Link::Dialing) {
            return;
        }
        let to = &self.schedulers[scheduler];
        let open = to.up && to.stopped <= self.now && to.lead.is_some() && !self.is_cut(node);
        if !open {
            // Whoever stands by says who leads; else the next of the list is tried.
            let leader = self.store.seat.map(|seat| seat.scheduler).filter(|leader| *leader != scheduler);
            self.nodes[node].target = leader.unwrap_or(scheduler + 1);
            return self.redial(node);
        }
        let reign = to.reign;
        let connection = self.connections.len();
        let opened = super::net::Connection { node, boots, scheduler, reign, at_node: true, at_scheduler: true };
        self.connections.push(opened);
        self.schedulers[scheduler].sessions[node] = Some(connection);
        self.register(node, connection);
    }

    /// The node ends its side.
    pub fn hang_up(&mut self, node: usize) {
        let Some(connection) = self.nodes[node].connection() else { return };
        self.connections[connection].at_node = false;
        let takes = if self.is_cut(node) { DEAD } else { self.random.below(500) };
        self.after(takes, Due::Closed { connection, at_node: false });
    }

    /// A scheduler's process or reign ends, and with it its connections. Some nodes are not told.
    pub fn hang_up_all(&mut self, scheduler: usize) {
        for node in 0..self.nodes.len() {
            let Some(connection) = self.schedulers[scheduler].sessions[node].take() else { continue };
            self.connections[connection].at_scheduler = false;
            let told = self.random.chance(0.9) && !self.is_cut(node);
            let takes = if told { self.random.below(200) } else { DEAD };
            self.after(takes, Due::Closed { connection, at_node: true });
        }
    }

    pub fn closed(&mut self, connection: usize, at_node: bool) {
        let Connection { node, boots, scheduler, reign, .. } = self.connections[connection];
        if at_node {
            if self.nodes[node].is(boots) && self.nodes[node].connection() == Some(connection) {
                self.connections[connection].at_node = false;
                self.lose_link(node);
            }
            return;
        }
        if self.schedulers[scheduler].reign == reign && self.connections[connection].at_scheduler {
            self.connections[connection].at_scheduler = false;
            if self.schedulers[scheduler].sessions[node] == Some(connection) {
                self.schedulers[scheduler].sessions[node] = None;
            }
            let boot = super::world::boot_id(node, boots);
            self.inbound(scheduler, reign, Inbound::Closed(boot));
        }
    }
}
