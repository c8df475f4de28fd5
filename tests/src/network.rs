//! Hosts on one network, as network namespaces of this machine. Takes root and `ip`.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Hosts `0..count` on a switch, each with two addresses: `10.77.0.(i + 1)` and `10.77.0.(i + 101)`. Gone when dropped.
pub struct Network {
    name: String,
    hosts: usize,
}

impl Network {
    /// None, with the reason, where namespaces cannot be made.
    pub fn new(hosts: usize) -> Result<Self, String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("farm-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        // From here on, whatever was made is removed on the way out.
        let network = Self { name, hosts };
        let switch = network.switch();
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", "switch", "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", "switch", "up"])?;
        for host in 0..hosts {
            let (namespace, port) = (network.namespace(host), format!("port{host}"));
            ip(&["netns", "add", &namespace])?;
            ip(&["-n", &switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &namespace])?;
            ip(&["-n", &switch, "link", "set", &port, "master", "switch", "up"])?;
            for address in [network.address(host), network.second_address(host)] {
                ip(&["-n", &namespace, "addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
            }
            ip(&["-n", &namespace, "link", "set", "eth0", "up"])?;
            ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
        }
        Ok(network)
    }

    pub fn hosts(&self) -> usize {
        self.hosts
    }

    pub fn address(&self, host: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, 1 + host as u8)
    }

    pub fn second_address(&self, host: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, 101 + host as u8)
    }

    /// A command that runs `program` on a host. The process that is started becomes the program.
    pub fn command(&self, host: usize, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(host)]).arg(program);
        command
    }

    /// Takes the calling thread to a host: sockets that it opens from now on, and threads that it starts, are there.
    pub fn enter(&self, host: usize) -> io::Result<()> {
        let namespace = File::open(Path::new("/run/netns").join(self.namespace(host)))?;
        // SAFETY: a call with an open file, which changes nothing but this thread.
        match unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Pulls the host's cable, or puts it back.
    pub fn set_link(&self, host: usize, up: bool) {
        ip(&["-n", &self.switch(), "link", "set", &format!("port{host}"), if up { "up" } else { "down" }]).unwrap();
    }

    fn switch(&self) -> String {
        format!("{}-switch", self.name)
    }

    fn namespace(&self, host: usize) -> String {
        format!("{}-{host}", self.name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let hosts = (0..self.hosts).map(|host| self.namespace(host));
        for namespace in hosts.chain([self.switch()]) {
            // Not all of them were made if making failed.
            let _ = ip(&["netns", "del", &namespace]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output().map_err(|e| format!("ip: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}
