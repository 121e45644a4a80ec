// SPDX-License-Identifier: MIT OR Apache-2.0
//
// emaudit for C++17: owning handles and typed results over the C interface in emaudit.h. Header-only, needs
// the standard library and emaudit.h, works with and without exceptions and RTTI.
//
//   auto directions = emaudit::Directions::open("model.safetensors");
//   if (!directions) { std::fprintf(stderr, "%s\n", directions.error().message()); return 1; }
//   auto probe = emaudit::Probe::make(*directions, 12);
//   ...
//   if (auto scored = probe->score(emaudit::Rows::f32(h, n, width), {scores, n}); !scored) { ... }
//
// Arrays are emaudit::Span: {pointer, size}, std::vector, std::array, and std::span in C++20.
//
// Two modes, the same source. Linked (the default): link libemaudit. Loaded: compile with EMAUDIT_DYNAMIC defined
// and link nothing; emaudit::load(path) finds the library at run time, and without it the first use looks for the
// SONAME. A library that is missing, has another ABI or lacks a function is then an error value of that first use
// (library_not_found, library_incompatible), with a sentence that says what to do.
//
// Handles are move-only; a moved-from handle may only be destroyed or assigned to. What is made from a handle
// keeps what it needs, so any order of destruction is fine. Const member functions may be called from several
// threads at once; a Monitor, a Drift, a Log and an Audit belong to one thread at a time. To replace what threads are using, put it
// into a ProbeSlot or a SteeringSlot. emaudit.h documents every operation in full.
#ifndef EMAUDIT_HPP
#define EMAUDIT_HPP

#include "emaudit/audit.hpp"
#include "emaudit/device.hpp"
#include "emaudit/directions.hpp"
#include "emaudit/drift.hpp"
#include "emaudit/kernel.hpp"
#include "emaudit/log.hpp"
#include "emaudit/monitor.hpp"
#include "emaudit/probe.hpp"
#include "emaudit/result.hpp"
#include "emaudit/rows.hpp"
#include "emaudit/slot.hpp"
#include "emaudit/steering.hpp"

#endif  // EMAUDIT_HPP
