// Probes and steerings replaced under load: threads use what they acquire while another thread replaces it. Every
// request must give exactly what one of the two gives, never a mixture. Fixtures in argv[1].
#include "handles.hpp"

#include <atomic>
#include <chrono>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

static_assert(!std::is_copy_constructible_v<emaudit::ProbeSlot>, "handles are move-only");
static_assert(std::is_nothrow_move_constructible_v<emaudit::SteeringSlot>, "moving is free");

namespace {

constexpr std::size_t rows = 24;
constexpr std::size_t readers = 3;
constexpr int replacements = 300;

using Values = std::vector<float>;

Values make_rows() {
  Values data(rows * width);
  for (std::size_t i = 0; i < data.size(); ++i) {
    data[i] = static_cast<float>(i * 31 % 251) / 64.0f - 1.953125f;
  }
  return data;
}

// Opened anew for each replacement, so that the memory of the one before is really released.
emaudit::Probe open_probe(const std::string &path) {
  auto directions = emaudit::Directions::open(path);
  CHECK(directions);
  return emaudit::Probe::make(*directions, layer).value();
}

emaudit::Steering open_steering(const std::string &path) {
  emaudit::SteeringOptions options;
  options.operation = emaudit::Operation::project_out;
  options.allow_nonspecific = true;
  return emaudit::Steering::make(open_probe(path), options).value();
}

Values use(const emaudit::Probe &probe, const Values &data) {
  Values scores(rows);
  CHECK(probe.score(emaudit::Rows::f32(data.data(), rows, width), scores));
  return scores;
}

Values use(const emaudit::Steering &steering, const Values &data) {
  Values edited = data;
  CHECK(steering.apply(emaudit::MutableRows::f32(edited.data(), rows, width)));
  return edited;
}

// `open` makes a handle from a path; the slot serves those of the two paths in turn.
template <class Slot, class Open>
void replace_under_load(Open open, const std::string (&paths)[2]) {
  const Values data = make_rows();
  const Values expected[2] = {use(open(paths[0]), data), use(open(paths[1]), data)};
  CHECK(expected[0].front() != expected[1].front() && expected[0].back() != expected[1].back());

  auto made = Slot::make(open(paths[0]));
  CHECK(made);
  const Slot slot = std::move(*made);
  std::atomic<bool> over{false};
  std::atomic<int> seen[2] = {{0}, {0}};
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < readers; ++i) {
    threads.emplace_back([&] {
      while (!over.load(std::memory_order_relaxed)) {
        const Values found = use(slot.acquire(), data);
        CHECK(found == expected[0] || found == expected[1]);
        seen[found == expected[0] ? 0 : 1].fetch_add(1, std::memory_order_relaxed);
      }
    });
  }
  const auto enough = [&] { return seen[0].load() > 50 && seen[1].load() > 50; };
  const auto begin = std::chrono::steady_clock::now();
  for (int n = 0; n < replacements || !enough(); ++n) {
    CHECK(std::chrono::steady_clock::now() - begin < std::chrono::minutes(5));
    CHECK(slot.replace(open(paths[n % 2 == 0 ? 1 : 0])));
    std::this_thread::yield();
  }
  over.store(true);
  for (std::thread &thread : threads) {
    thread.join();
  }
  std::fprintf(stderr, "%d and %d requests\n", seen[0].load(), seen[1].load());
}

void test_lifetimes(const std::string (&paths)[2]) {
  const Values data = make_rows();
  std::optional<emaudit::ProbeSlot> slot;
  {
    const emaudit::Probe probe = open_probe(paths[0]);
    slot = emaudit::ProbeSlot::make(probe).value();
  }
  const emaudit::Probe first = slot->acquire();
  const emaudit::Probe again = slot->acquire();
  CHECK(first.get() == again.get());  // the same probe, two handles
  const Values before = use(first, data);
  CHECK(slot->replace(open_probe(paths[1])));
  CHECK(slot->acquire().get() != first.get());
  CHECK(use(slot->acquire(), data) != before);
  slot.reset();
  CHECK(use(first, data) == before);  // it outlives its slot
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FIXTURES\n", argv[0]);
    return 2;
  }
  const std::string fixtures = argv[1];
  const std::string paths[2] = {fixtures + "/good.safetensors", fixtures + "/replacement.safetensors"};
  test_lifetimes(paths);
  replace_under_load<emaudit::ProbeSlot>(open_probe, paths);
  replace_under_load<emaudit::SteeringSlot>(open_steering, paths);
  std::printf("ok: reload\n");
  return 0;
}
