#include "emaudit.hpp"
#include "emaudit.hpp"  // including it twice changes nothing

#include "handles.hpp"

emaudit::Result<emaudit::Probe> probe_of_file(const std::string &path) {
  auto directions = emaudit::Directions::open(path);
  if (!directions) {
    return std::move(directions).error();
  }
  return emaudit::Probe::make(*directions, layer);  // the probe outlives the directions
}

std::size_t count_kernels() { return emaudit::kernels()->size(); }
