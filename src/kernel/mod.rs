#![doc = include_str!("contract.md")]

pub mod cuda;
mod dispatch;
mod edit;
mod generic;
mod many;
mod portable;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use dispatch::{KERNEL_VARIABLE, Kernel, KernelKind, Scored, available, best, error_bound};
