//! What the driver is asked for, by a stand-in for it; see `fake_driver.cpp`.

use std::ffi::{CStr, c_char};
use std::fs;
use std::io;
use std::process::Command;

use super::libraries::{Kind, Opened, Place, open_in};
use super::*;
use crate::engine::cuda::cache;
use crate::engine::cuda::device::{Arg, Buffer, Dtype, TensorMap, Work};
use crate::engine::cuda::kernels;
use crate::engine::cuda::tensor::Tensor;

/// A driver of the test's own, with its state.
struct Fake {
    driver: &'static Driver,
    opened: &'static Opened,
}

impl Fake {
    fn new() -> Self {
        Self::of(opened(1, 89))
    }

    fn hopper() -> Self {
        Self::of(opened(1, 90))
    }

    fn several(devices: usize) -> Self {
        Self::of(opened(devices, 89))
    }

    fn of(opened: Opened) -> Self {
        let opened: &Opened = Box::leak(Box::new(opened));
        Self { driver: Box::leak(Box::new(Driver::start(opened).unwrap())), opened }
    }

    fn device(&self) -> CudaDevice {
        CudaDevice::of(self.driver, 0).unwrap()
    }

    fn report(&self) -> String {
        // SAFETY: it is the declaration of what fake_driver.cpp has.
        unsafe {
            let report: libloading::Symbol<'_, unsafe extern "C" fn() -> *const c_char> =
                self.opened.library.get(b"fake_report\0").unwrap();
            CStr::from_ptr(report()).to_str().unwrap().to_owned()
        }
    }

    fn reaches(&self, reader: i32, owner: i32) -> bool {
        // SAFETY: as above.
        unsafe {
            let reaches: libloading::Symbol<'_, unsafe extern "C" fn(i32, i32) -> bool> =
                self.opened.library.get(b"fake_reaches\0").unwrap();
            reaches(reader, owner)
        }
    }

    fn waits(&self) -> usize {
        let report = self.report();
        let words: Vec<&str> = report.split(' ').collect();
        words[words.iter().position(|word| *word == "waits").unwrap() - 1].parse().unwrap()
    }
}

fn opened(devices: usize, capability: usize) -> Opened {
    let defines = format!("#define DEVICES {devices}\n#define CAPABILITY {capability}\n");
    let text = defines + include_str!("fake_driver.cpp");
    let flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-gnu-unique", "-x", "c++"];
    let built = cache::file("fake_driver.so", &[text.as_bytes(), flags.join(" ").as_bytes()], |out| {
        let input = out.with_extension("cpp");
        fs::write(&input, &text)?;
        let run = Command::new("c++").args(flags).arg(&input).arg("-o").arg(out).output()?;
        fs::remove_file(&input)?;
        if run.status.success() {
            Ok(())
        } else {
            Err(io::Error::other(String::from_utf8_lossy(&run.stderr).into_owned()))
        }
    })
    .unwrap();
    // A file of its own is opened anew.
    let folder = tempfile::tempdir().unwrap();
    fs::copy(built, folder.path().join("libcuda.so.1")).unwrap();
    open_in(Kind::Driver, &[Place::Folder(folder.path().into())]).unwrap_or_else(|error| panic!("{error}"))
}

fn values(count: usize) -> Vec<u8> {
    (0..count).map(|i| (i * 31 + i / 251) as u8).collect()
}

#[test]
fn a_gpu_tells_what_it_is() {
    let fake = Fake::new();
    let device = fake.device();
    assert_eq!(device.name(), "No GPU at all");
    let Properties { capability, multiprocessors, shared_memory, pci, .. } = device.properties();
    assert_eq!((*capability, *multiprocessors, *shared_memory), ((8, 9), 132, 100 << 10));
    assert_eq!(pci, "0000:3B:00.0");
    assert_eq!(fake.opened.version.as_deref(), Some("13.0"));
    let error = CudaDevice::of(fake.driver, 1).map(drop).unwrap_err();
    assert_eq!(error.to_string(), "open: there is no GPU 1: this machine has 1");
}

#[test]
fn a_driver_without_a_gpu_says_so() {
    let error = Driver::start(&opened(0, 89)).map(drop).unwrap_err();
    assert_eq!(error, "the driver for CUDA 13.0 finds no GPU");
}

#[test]
fn what_is_copied_in_arrives_though_its_source_is_overwritten() {
    let fake = Fake::new();
    let device = Arc::new(fake.device());
    // More than the two halves, in pieces that end anywhere.
    let wanted = values(40 << 20);
    let memory = Buffer::new(&device, wanted.len()).unwrap();
    let (mut source, mut at) = (Vec::new(), 0);
    for size in [1, 7, 100_000, 9 << 20, 3, 20 << 20].into_iter().chain([usize::MAX]) {
        let size = size.min(wanted.len() - at);
        source.clear();
        source.extend_from_slice(&wanted[at..at + size]);
        device.copy_in(memory.address() + at as u64, &source).unwrap();
        source.fill(0xee);
        at += size;
    }
    let mut got = vec![0; wanted.len()];
    device.copy_out(memory.address(), &mut got).unwrap();
    assert!(got == wanted);
}

#[test]
fn small_copies_in_wait_for_nothing() {
    let fake = Fake::new();
    let device = Arc::new(fake.device());
    let memory = Buffer::new(&device, 1 << 20).unwrap();
    for i in 0..1000 {
        device.copy_in(memory.address() + 100 * i, &values(100)).unwrap();
    }
    assert_eq!(fake.waits(), 0);
}

#[test]
fn copies_within_the_device_and_parts_come_out() {
    let fake = Fake::new();
    let device = Arc::new(fake.device());
    let (a, b) = (Buffer::new(&device, 1000).unwrap(), Buffer::new(&device, 1000).unwrap());
    device.copy_in(a.address(), &values(1000)).unwrap();
    device.copy(b.address() + 500, a.address() + 300, 200).unwrap();
    let mut got = vec![0; 200];
    device.copy_out(b.address() + 500, &mut got).unwrap();
    assert_eq!(got, values(1000)[300..500]);
}

#[test]
fn a_full_device_gives_back_what_it_keeps_before_it_errs() {
    let fake = Fake::new();
    let device = Arc::new(fake.device());
    // Kept when it is freed, and too small for the next.
    drop((Buffer::new(&device, 30 << 20).unwrap(), Buffer::new(&device, 30 << 20).unwrap()));
    assert_eq!(device.memory().unwrap().total, 64 << 20);
    let large = Buffer::new(&device, 60 << 20).unwrap();
    assert_eq!(device.memory().unwrap().free, 4 << 20);
    let error = Buffer::new(&device, 5 << 20).map(drop).unwrap_err();
    assert!(matches!(error, EngineError::OutOfMemory { wanted, .. } if wanted == 5 << 20), "{error}");
    drop(large);
    device.synchronize().unwrap();
    assert_eq!(device.memory().unwrap().free, 64 << 20, "what is kept is free");
}

#[test]
fn a_launch_has_its_arguments_and_asks_for_its_shared_memory() {
    let fake = Fake::new();
    let device = Arc::new(fake.device());
    let floats = |values: [f32; 3]| values.map(f32::to_le_bytes).concat();
    let tensors: Vec<_> = (0..3).map(|_| Buffer::new(&device, 12).unwrap()).collect();
    device.copy_in(tensors[0].address(), &floats([1.0, 2.0, 3.0])).unwrap();
    device.copy_in(tensors[1].address(), &floats([10.0, 20.0, 30.0])).unwrap();
    let mut args: Vec<Arg> = tensors.iter().map(|tensor| Arg::Pointer(tensor.address())).collect();
    args.push(Arg::Long(3));
    let launch = Launch {
        kernel: kernels::add.of(Dtype::F32),
        grid: [3, 2, 1],
        block: 64,
        shared: 0,
        args: &args,
        work: Work::moving(36),
    };
    device.launch(&launch).unwrap();
    assert!(fake.report().ends_with("add_f32 3 2 1 64 0"), "{}", fake.report());
    let mut got = vec![0; 12];
    device.copy_out(tensors[2].address(), &mut got).unwrap();
    assert_eq!(got, floats([11.0, 22.0, 33.0]));

    // Beside the kernel's own kilobyte there are 47 without asking; more wants asking, and has an end.
    for shared in [47 << 10, 48 << 10, 99 << 10, 64 << 10] {
        device.launch(&Launch { shared, ..launch }).unwrap();
    }
    let error = device.launch(&Launch { shared: 100 << 10, ..launch }).unwrap_err().to_string();
    assert!(error.starts_with(
        "launch: pointwise::add_f32, [3, 2, 1] blocks of 64 threads and 102400 bytes: cuFuncSetAttribute: "
    ));
}

#[test]
fn gpus_reach_each_others_memory_where_the_machine_lets_them() {
    let fake = Fake::several(3);
    let gpus = CudaDevice::several(fake.driver, 3).unwrap();
    let link = |a: usize, b: usize| gpus[a].link_to(&gpus[b]).unwrap();
    assert_eq!([link(0, 1), link(1, 2), link(2, 0)], [PeerLink::NvLink, PeerLink::Bus, PeerLink::Host]);
    for (reader, owner) in (0..3).flat_map(|reader| (0..3).map(move |owner| (reader, owner))) {
        assert_eq!(fake.reaches(reader, owner), (reader - owner).abs() == 1, "{reader} from {owner}");
    }
    assert!(CudaDevice::several(fake.driver, 4).is_err());
}

/// The stand-in does nothing that nobody waits for, and ends the process when it copies from freed memory: whatever is not
/// ordered comes out wrong here.
#[test]
fn what_another_gpu_takes_is_there_when_it_is_used_and_is_kept_until_it_has_been_copied() {
    let fake = Fake::several(3);
    let gpus = CudaDevice::several(fake.driver, 3).unwrap();
    // Access or not makes no difference but in time; nor does who is waited for first.
    for (from, to, sender_first) in [(0, 1, true), (0, 1, false), (2, 0, true), (2, 0, false)] {
        let (theirs, ours, waits) = (&gpus[from], &gpus[to], fake.waits());
        let handed = Tensor::new("test", theirs, &[250], Dtype::F32).unwrap();
        theirs.copy_in(handed.address(), &values(1000)).unwrap();
        let part = handed.part(50, &[100]).handed().unwrap();
        let later = Tensor::new("test", theirs, &[100], Dtype::F32).unwrap();
        theirs.copy(later.address(), handed.address(), 400).unwrap();
        drop(handed);
        let taken = part.taken(ours).unwrap();
        assert_eq!((taken.dims(), fake.waits()), (&[100][..], waits), "nobody waits");
        if sender_first {
            // The memory that was handed over has no user left: it goes when it has been copied.
            theirs.synchronize().unwrap();
        }
        let mut got = vec![0; 400];
        ours.copy_out(taken.address(), &mut got).unwrap();
        assert_eq!(got, values(1000)[200..600], "{from} to {to}, the sender first: {sender_first}");
        theirs.copy_out(later.address(), &mut got).unwrap();
        assert_eq!(got, values(1000)[..400]);
        drop((later, taken));
        for gpu in &gpus {
            gpu.synchronize().unwrap();
            assert_eq!(gpu.memory().unwrap().free, 64 << 20);
        }
    }
}

#[test]
fn a_tensor_that_was_not_handed_over_is_not_taken_from_another_gpu() {
    let fake = Fake::several(2);
    let gpus = CudaDevice::several(fake.driver, 2).unwrap();
    let tensor = Tensor::new("test", &gpus[0], &[4], Dtype::F32).unwrap();
    assert!(tensor.clone().taken(&gpus[1]).map(drop).unwrap_err().to_string().contains("was not handed over"));
    let same = tensor.handed().unwrap().taken(&gpus[0]).unwrap();
    assert_eq!(same.address(), tensor.address());
    let none = Tensor::new("test", &gpus[0], &[0, 4], Dtype::F32).unwrap().handed().unwrap();
    assert_eq!(none.taken(&gpus[1]).unwrap().dims(), [0, 4]);
}

#[test]
fn a_copy_that_finds_no_room_is_out_of_memory_and_takes_none() {
    let fake = Fake::several(2);
    let gpus = CudaDevice::several(fake.driver, 2).unwrap();
    let handed = Tensor::new("test", &gpus[0], &[5 << 20], Dtype::F32).unwrap().handed().unwrap();
    let full = Buffer::new(&gpus[1], 50 << 20).unwrap();
    let error = handed.clone().taken(&gpus[1]).map(drop).unwrap_err();
    assert!(matches!(error, EngineError::OutOfMemory { wanted, .. } if wanted == 20 << 20), "{error}");
    drop(full);
    assert_eq!(handed.taken(&gpus[1]).unwrap().dims(), [5 << 20]);
}

#[test]
fn only_a_hopper_runs_what_is_for_hopper() {
    for (fake, runs) in [(Fake::new(), false), (Fake::hopper(), true)] {
        let device = fake.device();
        assert!(device.runs(Source::Attention));
        assert_eq!(device.runs(Source::AttentionHopper), runs);
    }
}

#[test]
fn a_launch_has_what_the_driver_makes_of_a_tensor_map() {
    let fake = Fake::hopper();
    let device = Arc::new(fake.device());
    let memory = Buffer::new(&device, 64).unwrap();
    let map =
        TensorMap { address: memory.address(), sizes: [128, 24, 3000], strides: [256, 6144], region: [64, 1, 176] };
    let launch = |map| {
        let args = [Arg::Map(map), Arg::Int(7)];
        let kernel = kernels::attention_hopper_128.of(Dtype::Bf16);
        device.launch(&Launch {
            kernel,
            grid: [3, 2, 1],
            block: 384,
            shared: 200 << 10,
            args: &args,
            work: Work::moving(64),
        })
    };
    launch(map).unwrap();
    let made = format!("{}: 128 24 3000, 256 6144, 64 1 176; 7", memory.address());
    assert!(
        fake.report().ends_with(&format!("attention_hopper_128_bf16 3 2 1 384 204800 {made}")),
        "{}",
        fake.report()
    );
    let error = launch(TensorMap { address: map.address + 8, ..map }).unwrap_err().to_string();
    assert!(error.contains("cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_VALUE"), "{error}");
}

#[test]
fn errors_have_the_names_of_the_call_and_of_what_is_wrong() {
    let fake = Fake::new();
    let device = fake.device();
    let error = device.copy_in(4096, &[1]).unwrap_err();
    assert_eq!(error.to_string(), "cuMemcpyHtoDAsync: CUDA_ERROR_INVALID_VALUE (invalid argument)");
    assert_eq!(fake.driver.check("cuSomething", 9999).unwrap_err().to_string(), "cuSomething: error 9999");
}

#[test]
fn any_thread_may_use_a_device() {
    let fake = Fake::new();
    let device = Arc::new(fake.device());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let memory = Buffer::new(&device, 100).unwrap();
            device.copy_in(memory.address(), &values(100)).unwrap();
            device.copy_out(memory.address(), &mut [0; 100]).unwrap();
            device.synchronize().unwrap();
        });
    });
    std::thread::spawn(move || drop(device)).join().unwrap();
    assert!(
        fake.report().starts_with("0 memory 0 pinned 0 events 0 modules 0 streams 0 contexts"),
        "{}",
        fake.report()
    );
}

#[test]
fn two_ticks_have_the_time_of_what_was_started_between_them() {
    let fake = Fake::new();
    let device = Arc::new(fake.device());
    let memory = Buffer::new(&device, 100).unwrap();
    device.copy(memory.address(), memory.address() + 50, 50).unwrap();
    let start = device.tick().unwrap();
    for _ in 0..3 {
        device.copy(memory.address(), memory.address() + 50, 50).unwrap();
    }
    let end = device.tick().unwrap();
    assert_eq!(device.between(&start, &end).unwrap(), Duration::from_millis(3));
}

#[test]
fn all_is_given_back_at_the_end() {
    let fake = Fake::new();
    let device = Arc::new(fake.device());
    let loaded = device.load().unwrap();
    assert_eq!(loaded.compiled + loaded.cached, Source::ALL.iter().filter(|source| !source.wants_hopper()).count());
    assert_eq!(device.load().unwrap(), Loaded::default());
    let memory = Buffer::new(&device, 100).unwrap();
    device.copy_in(memory.address(), &values(100)).unwrap();
    drop(memory);
    drop(device);
    assert!(
        fake.report().starts_with("0 memory 0 pinned 0 events 0 modules 0 streams 0 contexts"),
        "{}",
        fake.report()
    );
}
