//! cxx bridge of emaudit.
