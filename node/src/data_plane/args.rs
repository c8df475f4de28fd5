//! Where a node is found by others, on the command line.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::Context;
use farm_core::comm::tcp::TlsFiles;
use tokio::net::{UdpSocket, lookup_host};

use super::{Options, Patience};

#[derive(clap::Args, Clone, Debug)]
pub struct DataPlaneArgs {
    /// Where other nodes' devices join decodes of this one
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:0")]
    pub data_listen: SocketAddr,
    /// Name or address that other nodes reach this one by [default: that of the interface towards the scheduler]
    #[arg(long, value_name = "HOST", value_parser = parse_host)]
    pub data_host: Option<String>,
    /// This node's certificate for connections between nodes, PEM, good for servers and clients. Without it they are
    /// neither encrypted nor authenticated beyond a token
    #[arg(long, value_name = "FILE", requires_all = ["data_key", "data_ca"])]
    pub data_cert: Option<PathBuf>,
    /// The key of --data-cert
    #[arg(long, value_name = "FILE", requires_all = ["data_cert", "data_ca"])]
    pub data_key: Option<PathBuf>,
    /// The authority whose certificates are nodes of the farm
    #[arg(long, value_name = "FILE", requires_all = ["data_cert", "data_key"])]
    pub data_ca: Option<PathBuf>,
}

impl DataPlaneArgs {
    /// `scheduler` is its `host:port`; nothing is sent there.
    pub async fn options(self, scheduler: &str) -> anyhow::Result<Options> {
        let mut listen = self.data_listen;
        let host = match self.data_host {
            Some(host) => Some(host),
            None if !listen.ip().is_unspecified() => None,
            None => {
                let found = address_towards(scheduler).await?;
                if found.is_ipv6() {
                    listen.set_ip(Ipv6Addr::UNSPECIFIED.into());
                }
                Some(found.to_string())
            }
        };
        let tls = match (self.data_cert, self.data_key, self.data_ca) {
            (Some(certificate), Some(key), Some(ca)) => Some(TlsFiles { certificate, key, ca }),
            _ => None,
        };
        Ok(Options { listen, host, tls, patience: Patience::default() })
    }
}

/// This machine's address on the way to `there`, `host:port`. Asks the routing table; nothing is sent.
async fn address_towards(there: &str) -> anyhow::Result<IpAddr> {
    const HINT: &str = "give --data-host";
    let to = lookup_host(there).await.ok().and_then(|mut found| found.next());
    let to = to.with_context(|| format!("{there} has no address; {HINT}"))?;
    let any = if to.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    let found = async {
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(to).await?;
        socket.local_addr()
    };
    let found = found.await.with_context(|| format!("no interface leads to {there}; {HINT}"))?;
    Ok(found.ip())
}

fn parse_host(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    if text.parse::<IpAddr>().is_ok() || (!text.is_empty() && text.chars().all(plain)) {
        Ok(text.to_owned())
    } else {
        Err(format!("{text:?} is no host: write a name or an address, without a port or a scheme"))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        data: DataPlaneArgs,
    }

    fn parse(line: &str) -> Result<DataPlaneArgs, clap::Error> {
        Cli::try_parse_from(["node"].into_iter().chain(line.split_whitespace())).map(|cli| cli.data)
    }

    #[test]
    fn files_of_tls_are_given_all_or_none() {
        for good in ["", "--data-cert a --data-key b --data-ca c", "--data-host ::1", "--data-host a.b"] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in ["--data-cert a", "--data-key b --data-ca c", "--data-host a:1", "--data-host http://a"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn the_address_is_that_of_the_interface_towards_the_scheduler() {
        let options = parse("").unwrap().options("127.0.0.1:7070").await.unwrap();
        assert_eq!(options.host.as_deref(), Some("127.0.0.1"));
        let named = parse("--data-host here").unwrap().options("127.0.0.1:7070").await.unwrap();
        assert_eq!(named.host.as_deref(), Some("here"));
        let listening = parse("--data-listen 127.0.0.2:0").unwrap().options("127.0.0.1:7070").await.unwrap();
        assert_eq!(listening.host, None);
        assert!(parse("").unwrap().options("no-such-host.invalid:1").await.is_err());
    }
}
