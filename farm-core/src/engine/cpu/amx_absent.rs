//! In the place of the matrix units where there are none: [`available`] says so, and nothing else is ever called.

use super::data::Bits;
use super::product::{Finish, Target};

const ABSENT: &str = "this processor has no matrix units";

pub(super) const DEPTH: usize = 512;

pub(super) fn available() -> bool {
    false
}

#[derive(Clone, Copy, Default)]
pub(super) struct Tile;

// Safety: it is nothing.
unsafe impl Bits for Tile {}

pub(super) struct Configured;

impl Configured {
    pub fn new() -> Self {
        unreachable!("{ABSENT}")
    }
}

pub(super) fn right_tiles(_: usize, _: usize, _: usize) -> usize {
    unreachable!("{ABSENT}")
}

pub(super) fn arrange_left<const P: usize>(_: &[f32], _: usize, _: [usize; 2], _: &mut Vec<Tile>) {
    unreachable!("{ABSENT}")
}

pub(super) fn arrange_left_of(_: usize, _: &[f32], _: usize, _: [usize; 2], _: &mut Vec<Tile>) {
    unreachable!("{ABSENT}")
}

pub(super) fn arrange_right<const P: usize>(_: &[f32], _: &mut [Tile]) {
    unreachable!("{ABSENT}")
}

/// # Safety
/// Never called.
pub(super) unsafe fn product<const P: usize>(
    _: &Configured,
    _: &[Tile],
    _: &[Tile],
    _: [usize; 2],
    _: Target,
    _: Finish<'_>,
) {
    unreachable!("{ABSENT}")
}

/// # Safety
/// Never called.
pub(super) unsafe fn product_of(
    _: usize,
    _: &Configured,
    _: &[Tile],
    _: &[Tile],
    _: [usize; 2],
    _: Target,
    _: Finish<'_>,
) {
    unreachable!("{ABSENT}")
}
