//! Groups of GPUs, each with a memory of its own, which are emulated here: a kernel or a copy that is given memory of another
//! device is an error. By threads of one process and by processes, one of which is killed.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use farm_tests::{programs, repository};

fn render(steps: usize, more: &str, out: Option<&Path>) -> Command {
    let mut command = Command::new(programs().join("farm-node"));
    command.args(["render", "--prompt", "a red ball", "--width", "32", "--height", "32", "--num-frames", "7"]);
    command.args(["--seed", "1", "--steps", &steps.to_string(), "--model"]).arg(repository().join("assets/mochi-tiny"));
    if let Some(out) = out {
        command.arg("--out").arg(out);
    }
    command.args(more.split(' ')).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// One rank's process, which ends with the test.
struct Rank(Child);

impl Rank {
    fn start(rank: usize, ports: [u16; 2], steps: usize, more: &str, out: Option<&Path>) -> Self {
        let [first, second] = ports;
        let group =
            format!("--rank {rank} --world 2 --peers 127.0.0.1:{first},127.0.0.1:{second} --patience 20 {more}");
        Self(render(steps, &group, out).spawn().unwrap())
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Two that nobody listens on now.
fn free_ports() -> [u16; 2] {
    let listeners = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

#[test]
fn gpus_that_render_a_clip_together_give_the_clip_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let of = |devices: &str| {
        let out = folder.path().join("clip.rgb");
        let done = render(1, &format!("--devices {devices}"), Some(&out)).output().unwrap();
        assert!(done.status.success(), "{devices}: {}", String::from_utf8_lossy(&done.stderr));
        std::fs::read(out).unwrap()
    };
    let expected = of("emulated:1");
    // Without a ring to the bit; what a ring rounds differently is too little for a pixel here.
    for group in ["2 --ulysses 2 --shard", "2 --ring 2 --tiles auto", "4 --cfg 2 --ring 2"] {
        assert!(of(&format!("emulated:{group}")) == expected, "{group}");
    }
}

#[test]
fn processes_with_a_gpu_each_give_the_clip_of_one_and_name_the_one_that_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one.rgb"), folder.path().join("two.rgb"));
    let gpu = "--devices emulated:1 --precision bf16";
    assert!(render(1, gpu, Some(&one)).status().unwrap().success());

    let (ports, ulysses) = (free_ports(), format!("{gpu} --ulysses 2"));
    let mut ranks = [0, 1].map(|rank| Rank::start(rank, ports, 1, &ulysses, (rank == 0).then_some(&two)));
    for rank in &mut ranks {
        assert!(rank.0.wait().unwrap().success());
    }
    assert!(std::fs::read(one).unwrap() == std::fs::read(&two).unwrap());

    let ports = free_ports();
    // f32 is less work in the emulation.
    let ulysses = "--devices emulated:1 --ulysses 2";
    let mut ranks = [0, 1].map(|rank| Rank::start(rank, ports, 60, ulysses, (rank == 0).then_some(&two)));
    let mut said = BufReader::new(ranks[0].0.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("denoise 1/") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "the leader ended before the second step");
    }
    ranks[1].0.kill().unwrap();
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    let last = rest.lines().last().unwrap_or_default();
    assert!(!ranks[0].0.wait().unwrap().success() && last.contains("rank 1 "), "{rest}");
}
