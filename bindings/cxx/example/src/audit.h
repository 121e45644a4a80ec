#pragma once
#include "rust/cxx.h"

#include <cstdint>

std::int32_t audit(rust::Str path);
