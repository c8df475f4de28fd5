//! Hopper's instructions in the emulation, by a program of their own: what they refuse ends the process.

use std::path::PathBuf;
use std::process::{Command, Output};

use super::{HEADERS, built};

fn program() -> PathBuf {
    let parts = [
        HEADERS,
        include_str!("../kernels/common.cuh"),
        include_str!("../kernels/tensor_core.cuh"),
        include_str!("../kernels/hopper.cuh"),
        include_str!("tests.cpp"),
    ];
    built("emulated_hopper_tests", &parts.join("\n"), &[]).unwrap_or_else(|error| panic!("{error}"))
}

fn run(program: &PathBuf, case: &str) -> (Output, String) {
    let output = Command::new(program).arg(case).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, said)
}

#[test]
fn hoppers_instructions_do_what_plain_loops_do() {
    let program = program();
    for case in ["tile", "phases", "product_of_tiles", "product_of_registers", "products_under_way", "turns"] {
        let (output, said) = run(&program, case);
        assert!(output.status.success(), "{case}: {said}");
    }
}

#[test]
fn what_hopper_would_not_do_right_ends_the_process() {
    let program = program();
    for (case, why) in [
        ("barrier_not_made", "a barrier that nobody has made"),
        ("barrier_not_fenced", "a tile for a barrier that TMA cannot see yet"),
        ("one_arrival_too_many", "more arrivals at a barrier than it is made for"),
        ("bytes_too_few", "more bytes at a barrier than were announced"),
        ("bytes_too_many", "threads wait at different barriers"),
        ("tile_misplaced", "a tile at no multiple of 1024"),
        ("tile_beyond", "an address beyond the block's dynamic shared memory"),
        ("tile_of_nothing", "no tensor map"),
        ("tile_left", "a block that ends before its tiles are there"),
        ("product_left", "a block that ends before its products"),
        ("product_without_fence", "a product without a fence before it"),
        ("product_of_a_warp", "threads wait at different barriers"),
        ("matrix_beyond", "an address beyond the block's dynamic shared memory"),
        ("matrix_misplaced", "a matrix that does not begin where its rows do"),
        ("matrix_columns_misplaced", "columns of a matrix that do not begin where its rows do"),
        ("matrix_without_swizzle", "a matrix of another swizzle, or with a base offset"),
        ("matrices_differ", "lanes of a warp that give different matrices"),
        ("sums_written", "sums that were written while a product is under way"),
        ("registers_written", "registers that were written while a product reads them"),
        ("turn_left", "a barrier that some came to and nobody waited at"),
        ("turn_of_two_sizes", "a barrier for two numbers of threads"),
    ] {
        let (output, said) = run(&program, case);
        assert!(!output.status.success() && said.contains(why), "{case} says {said:?}");
    }
}
