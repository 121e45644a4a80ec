// EMAUDIT_DYNAMIC: every way in which there is no usable library is an error value; then threads race to load it.
// argv: the fixtures with the wrong libraries beside them, and the good library. Its SONAME is not on the path.
#include "emaudit.hpp"

#include "handles.hpp"

#include <cstring>
#include <thread>

#ifndef EMAUDIT_DYNAMIC
#error "this test is about loading"
#endif

using emaudit::Status;

namespace {

bool says(const char *message, const char *part) {
  if (std::strstr(message, part) != nullptr) {
    return true;
  }
  std::fprintf(stderr, "`%s` does not say `%s`\n", message, part);
  return false;
}

void test_missing(const std::string &fixtures) {
  auto directions = emaudit::Directions::open(fixtures + "/good.safetensors");
  CHECK(directions.status() == Status::library_not_found);
  CHECK(says(directions.error().message(), "libemaudit"));
  CHECK(emaudit::kernels().status() == Status::library_not_found);
  CHECK(emaudit::load().status() == Status::library_not_found);
  CHECK(emaudit::load(fixtures + "/absent.so").status() == Status::library_not_found);
  CHECK(emaudit::load(fixtures + "/text.safetensors").status() == Status::library_not_found);
  CHECK(std::strcmp(emaudit::version(), "") == 0);
  CHECK(std::strcmp(emaudit::name(Status::truncated), "UNKNOWN") == 0);
  CHECK(std::strcmp(emaudit::name(emaudit::Kernel::scalar), "unknown") == 0);
  CHECK(std::strcmp(emaudit::name(Status::library_not_found), "LIBRARY_NOT_FOUND") == 0);
}

void test_wrong(const std::string &fixtures) {
  auto stranger = emaudit::load(fixtures + "/stranger.so");
  CHECK(stranger.status() == Status::library_incompatible);
  CHECK(says(stranger.error().message(), "no emaudit library"));
  auto other = emaudit::load(fixtures + "/other_abi.so");
  CHECK(other.status() == Status::library_incompatible && says(other.error().message(), "has ABI 99"));
  auto old = emaudit::load(fixtures + "/too_old.so");
  CHECK(old.status() == Status::library_incompatible && says(old.error().message(), "has no emaudit_version"));
  CHECK(std::strcmp(emaudit::name(Status::library_incompatible), "LIBRARY_INCOMPATIBLE") == 0);
}

void test_threads(const std::string &fixtures, const std::string &library) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      CHECK(emaudit::load(library));
      auto probe = probe_of_file(fixtures + "/good.safetensors");
      CHECK(probe && probe->width() == width);
    });
  }
  for (std::thread &thread : threads) {
    thread.join();
  }
}

}  // namespace

emaudit::Result<emaudit::Probe> probe_of_file(const std::string &path) {
  auto directions = emaudit::Directions::open(path);
  return directions ? emaudit::Probe::make(*directions, layer)
                    : emaudit::Result<emaudit::Probe>(std::move(directions).error());
}

int main(int argc, char **argv) {
  CHECK(argc == 3);
  const std::string fixtures = argv[1], library = argv[2];
  test_missing(fixtures);
  test_wrong(fixtures);
  test_threads(fixtures, library);
  CHECK(emaudit::load() && emaudit::load(library));
  auto another = emaudit::load(fixtures + "/copy.so");
  CHECK(another.status() == Status::invalid_argument && says(another.error().message(), "copy.so"));
  CHECK(std::strcmp(emaudit::name(Status::truncated), "TRUNCATED") == 0);
  CHECK(emaudit::Directions::open(fixtures + "/truncated.safetensors").status() == Status::truncated);
  std::printf("ok: loader\n");
  return 0;
}
