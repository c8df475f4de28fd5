//! The way to the nodes, as the rest of the scheduler sees it.

use farm_core::id::BootId;
use farm_core::wire::cluster::{Cluster, ClusterError};

pub trait NodeLink: Send + Sync {
    /// Queues an encoded envelope for a node. `Ok` does not mean that it arrives.
    fn send(&self, boot: BootId, frame: Vec<u8>) -> Result<(), ClusterError>;

    /// Takes over a connection of a node that HTTP has authenticated and upgraded.
    fn accept(&self, upgraded: hyper::upgrade::Upgraded, boot: BootId) -> Result<(), ClusterError>;

    /// Ends the session of a node. It dials again, and finds who leads.
    fn disconnect(&self, boot: BootId);

    /// Ends all sessions.
    fn disconnect_all(&self);
}

impl NodeLink for Cluster {
    fn send(&self, boot: BootId, frame: Vec<u8>) -> Result<(), ClusterError> {
        self.send_to_node(boot, frame)
    }

    fn accept(&self, upgraded: hyper::upgrade::Upgraded, boot: BootId) -> Result<(), ClusterError> {
        Cluster::accept(self, upgraded, boot)
    }

    fn disconnect(&self, boot: BootId) {
        Cluster::disconnect(self, boot);
    }

    fn disconnect_all(&self) {
        Cluster::disconnect_all(self);
    }
}
