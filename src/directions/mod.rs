//! The direction file: reading, checking, writing. The specification is FORMAT.md.

pub mod schema;
