//! The kernels: CUDA C++ sources that are part of the program, compiled where they are used (by NVRTC for a GPU, by a C++
//! compiler for the emulation).
//!
//! A kernel that works on tensors of either type, or gives either, exists twice, as `NAME_f32` and `NAME_bf16`.

use std::fmt;

use super::device::Dtype;

/// A file of kernels. Every file begins with `common.cuh`; behind it is what it shares with some of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// Values one by one, and the moving of values.
    Pointwise,
    /// Norms, gates and rotations of rows.
    Rows,
    Attention,
    /// By instructions that only Hopper has: compiled for `sm_90a` and for nothing else.
    AttentionHopper,
    /// Matrix products and convolutions.
    Product,
    /// Frames: group norms, depth to space, pixels.
    Volume,
}

impl Source {
    pub const ALL: [Self; 6] =
        [Self::Pointwise, Self::Rows, Self::Attention, Self::AttentionHopper, Self::Product, Self::Volume];

    pub fn name(self) -> &'static str {
        match self {
            Self::Pointwise => "pointwise",
            Self::Rows => "rows",
            Self::Attention => "attention",
            Self::AttentionHopper => "attention_hopper",
            Self::Product => "product",
            Self::Volume => "volume",
        }
    }

    /// The whole text, for a compiler that finds no other file.
    pub fn text(self) -> String {
        let own = match self {
            Self::Pointwise => include_str!("kernels/pointwise.cu"),
            Self::Rows => include_str!("kernels/rows.cu"),
            Self::Attention => include_str!("kernels/attention.cu"),
            Self::AttentionHopper => include_str!("kernels/attention_hopper.cu"),
            Self::Product => include_str!("kernels/product.cu"),
            Self::Volume => include_str!("kernels/volume.cu"),
        };
        let (tensor_core, hopper, segments) = (
            include_str!("kernels/tensor_core.cuh"),
            include_str!("kernels/hopper.cuh"),
            include_str!("kernels/segments.cuh"),
        );
        let shared: &[&str] = match self {
            Self::Attention => &[tensor_core, segments],
            Self::AttentionHopper => &[tensor_core, hopper, segments],
            Self::Product => &[tensor_core],
            Self::Pointwise | Self::Rows | Self::Volume => &[],
        };
        [&[include_str!("kernels/common.cuh")], shared, &[own]].concat().join("\n")
    }

    /// Whether its kernels run on machine code for Hopper alone.
    pub fn wants_hopper(self) -> bool {
        self == Self::AttentionHopper
    }
}

/// A kernel of a file.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel {
    pub source: Source,
    /// Without the type of its tensors.
    stem: &'static str,
    /// None if there is one kernel for all types.
    dtype: Option<Dtype>,
}

impl Kernel {
    /// As the source calls it.
    pub fn name(self) -> String {
        match self.dtype {
            Some(dtype) => format!("{}_{dtype}", self.stem),
            None => self.stem.to_owned(),
        }
    }

    /// Of its tensors, if there is a kernel for each type.
    pub fn dtype(self) -> Option<Dtype> {
        self.dtype
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}", self.source.name(), self.name())
    }
}

/// A kernel that exists for f32 and for bf16.
#[derive(Clone, Copy, Debug)]
pub struct Typed {
    source: Source,
    stem: &'static str,
}

impl Typed {
    pub fn of(self, dtype: Dtype) -> Kernel {
        Kernel { source: self.source, stem: self.stem, dtype: Some(dtype) }
    }
}

/// Declares the kernels of every file: those that exist for both types, and those that exist once.
macro_rules! kernels {
    ($($source:ident: [$($typed:ident)*] [$($plain:ident)*];)*) => {
        $(
            $(#[allow(non_upper_case_globals)]
            pub const $typed: Typed = Typed { source: Source::$source, stem: stringify!($typed) };)*
            $(#[allow(non_upper_case_globals)]
            pub const $plain: Kernel = Kernel { source: Source::$source, stem: stringify!($plain), dtype: None };)*
        )*

        /// All of them.
        pub fn all() -> impl Iterator<Item = Kernel> {
            let typed: &[Typed] = &[$($($typed,)*)*];
            let plain: &[Kernel] = &[$($($plain,)*)*];
            let typed = typed.iter().flat_map(|kernel| [Dtype::F32, Dtype::Bf16].map(|dtype| kernel.of(dtype)));
            typed.chain(plain.iter().copied())
        }
    };
}

kernels! {
    Pointwise: [add gelu_gated swiglu silu copy_runs unpatchify] [to_f32_of_bf16 to_bf16_of_f32 euler_step patchify draw];
    Rows: [rms_norm gated_residual layer_norm tanh split_qkv] [rope_table merge_attention];
    Attention: [attention attention_mma_32 attention_mma_64 attention_mma_128] [];
    AttentionHopper: [attention_hopper_128] [];
    Product: [product product_scalar convolution convolution_scalar] [];
    Volume: [denormalize_latent group_sums group_norm_silu depth_to_space_time to_rgb8 to_rgb16]
        [group_moments group_totals group_scales];
}
