//! Which cores the threads of each device are kept on.

use std::collections::BTreeSet;
use std::path::Path;
use std::{fs, io};

use anyhow::Context;

/// Cores of each device, disjoint and `threads` each: in order, within the first NUMA node that still has room for the
/// whole device. A device that no node has room for takes from as few nodes as it can. `nodes` lists the cores of each
/// NUMA node; cores of none count as one more node.
pub fn assign(
    nodes: &[Vec<usize>],
    allowed: &BTreeSet<usize>,
    devices: usize,
    threads: usize,
) -> Result<Vec<Vec<usize>>, TooFewCores> {
    let needed = devices.saturating_mul(threads);
    let mut left = allowed.clone();
    let mut take = |node: &Vec<usize>| node.iter().copied().filter(|core| left.remove(core)).collect::<BTreeSet<_>>();
    let mut free: Vec<BTreeSet<usize>> = nodes.iter().map(&mut take).collect();
    free.push(left);
    if needed > allowed.len() {
        return Err(TooFewCores { devices, threads, needed, allowed: allowed.len() });
    }
    let place = |_| {
        let mut cores = Vec::with_capacity(threads);
        if let Some(node) = free.iter_mut().find(|node| node.len() >= threads) {
            cores.extend((0..threads).filter_map(|_| node.pop_first()));
        }
        while cores.len() < threads
            && let Some(node) = free.iter_mut().filter(|node| !node.is_empty()).max_by_key(|node| node.len())
        {
            let missing = threads - cores.len();
            cores.extend((0..missing).map_while(|_| node.pop_first()));
        }
        cores
    };
    Ok((0..devices).map(place).collect())
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{devices} devices of {threads} threads need {needed} cores of their own, and this process may use {allowed}: give fewer \
     devices or threads, or the process more cores (its cpuset and affinity count)"
)]
pub struct TooFewCores {
    devices: usize,
    threads: usize,
    needed: usize,
    allowed: usize,
}

/// Cores of a list as the kernel writes it, for example `0-3,8`.
fn parse_list(text: &str) -> Option<Vec<usize>> {
    let mut cores = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= libc::CPU_SETSIZE as usize {
            return None;
        }
        cores.extend(first..=last);
    }
    Some(cores)
}

/// Cores of each NUMA node of this machine, in the order of their numbers; none where the kernel knows no nodes.
pub fn numa_nodes() -> anyhow::Result<Vec<Vec<usize>>> {
    let folder = Path::new("/sys/devices/system/node");
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| folder.display().to_string()),
    };
    let mut nodes = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| folder.display().to_string())?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("node")).and_then(|n| n.parse::<usize>().ok());
        if let Some(number) = number {
            let path = entry.path().join("cpulist");
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let cores = parse_list(&text).with_context(|| format!("{} is no list: {text:?}", path.display()))?;
            nodes.push((number, cores));
        }
    }
    nodes.sort();
    Ok(nodes.into_iter().map(|(_, cores)| cores).collect())
}

/// Cores that the calling thread may run on.
pub fn allowed() -> io::Result<BTreeSet<usize>> {
    // SAFETY: the set is plain data for which zero is a value, and valid for writing; 0 is the calling thread.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return Err(io::Error::last_os_error());
        }
        set
    };
    // SAFETY: reads a bit of the set, and the numbers are below its size.
    Ok((0..libc::CPU_SETSIZE as usize).filter(|&core| unsafe { libc::CPU_ISSET(core, &set) }).collect())
}

/// Keeps the calling thread, and threads that it starts from now on, on these cores.
pub fn pin_thread(cores: &[usize]) -> io::Result<()> {
    // SAFETY: the set is plain data, zeroed and filled by the macros' functions, which check the number; 0 is the calling
    // thread.
    let pinned = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        for &core in cores.iter().filter(|&&core| core < libc::CPU_SETSIZE as usize) {
            libc::CPU_SET(core, &mut set);
        }
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    if pinned == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Nodes with cores dealt in any way, and which of the cores are allowed.
    fn machines() -> impl Strategy<Value = (Vec<Vec<usize>>, BTreeSet<usize>)> {
        // Of each core: its node, where 4 is none, and whether it is allowed.
        prop::collection::vec((0..5usize, prop::bool::weighted(0.8)), 1..40).prop_map(|cores| {
            let on = |node| cores.iter().enumerate().filter(move |(_, (at, _))| *at == node).map(|(core, _)| core);
            let allowed = cores.iter().enumerate().filter(|(_, (_, allowed))| *allowed).map(|(core, _)| core);
            ((0..4).map(|node| on(node).collect()).collect(), allowed.collect())
        })
    }

    proptest! {
        #[test]
        fn devices_get_allowed_cores_of_their_own_and_one_node_where_there_is_room(
            (nodes, allowed) in machines(), devices in 1..6usize, threads in 1..9usize,
        ) {
            match assign(&nodes, &allowed, devices, threads) {
                Err(error) => {
                    prop_assert!(devices * threads > allowed.len());
                    let needed = format!("need {} cores", devices * threads);
                    prop_assert!(error.to_string().contains(&needed));
                }
                Ok(sets) => {
                    prop_assert_eq!(sets.len(), devices);
                    let all: BTreeSet<usize> = sets.iter().flatten().copied().collect();
                    prop_assert!(sets.iter().all(|set| set.len() == threads));
                    prop_assert_eq!(all.len(), devices * threads);
                    prop_assert!(all.is_subset(&allowed));
                    let node_of = |core: &usize| nodes.iter().position(|node| node.contains(core)).unwrap_or(nodes.len());
                    let count = |node: usize| allowed.iter().filter(|core| node_of(core) == node).count();
                    // All devices are of a size, so this many can be whole.
                    let room: usize = (0..=nodes.len()).map(|node| count(node) / threads).sum();
                    let whole = |set: &&Vec<usize>| set.iter().all(|core| node_of(core) == node_of(&set[0]));
                    prop_assert!(sets.iter().take(room).all(|set| whole(&set)));
                }
            }
        }
    }

    #[test]
    fn devices_follow_the_order_of_nodes_and_cores() {
        let nodes = [vec![0, 1, 2, 3], vec![4, 5, 6, 7]];
        let all = (0..8).collect();
        assert_eq!(assign(&nodes, &all, 3, 2).unwrap(), [[0, 1], [2, 3], [4, 5]]);
        assert_eq!(assign(&nodes, &all, 2, 3).unwrap(), [[0, 1, 2], [4, 5, 6]]);
        assert_eq!(assign(&nodes, &all, 1, 6).unwrap(), [[4, 5, 6, 7, 0, 1]]);
        assert_eq!(assign(&[], &BTreeSet::from([3, 9]), 1, 2).unwrap(), [[3, 9]]);
    }

    #[test]
    fn what_a_cpuset_forbids_is_missing_and_said() {
        let error = assign(&[vec![0, 1, 2, 3]], &BTreeSet::from([2, 3]), 2, 2).unwrap_err().to_string();
        assert!(
            error.contains("2 devices of 2 threads need 4 cores of their own, and this process may use 2"),
            "{error}"
        );
    }

    #[test]
    fn the_kernels_lists_are_read() {
        assert_eq!(parse_list("0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(parse_list("\n"), Some(vec![]));
        for bad in ["a", "3-1", "1-", "-1", "0-99999999999", "1,x"] {
            assert_eq!(parse_list(bad), None, "{bad}");
        }
        assert!(numa_nodes().is_ok());
    }

    #[test]
    fn a_pinned_thread_may_use_its_core_only() {
        let core = *allowed().unwrap().last().unwrap();
        let seen = std::thread::spawn(move || pin_thread(&[core]).and_then(|()| allowed())).join().unwrap();
        assert_eq!(seen.unwrap(), BTreeSet::from([core]));
        assert!(pin_thread(&[]).is_err());
    }
}
