// Four tenants in one batch, of which two are steered: four questions are read in one llama_decode and answered together.
//
//   batch MODEL.gguf DIRECTIONS.safetensors [--layer L] [--adapter LORA.gguf] [--alpha A] [--system TEXT] [--tokens N]
//
// The slots 0 and 2 are left as they are, 1 and 3 have A times the direction subtracted; 0 and 1 get the same question, and
// so do 2 and 3.
#include "host.hpp"
#include "metrics.hpp"

#include <emaudit/llama_cpp.hpp>

#include <array>

namespace {

namespace llama_cpp = emaudit::llama_cpp;

constexpr std::int32_t slots = 4;

struct Slot {
  std::string text;
  std::int32_t index = -1;  // of its last token in the batch
  llama_pos position = 0;
  bool done = false;
};

}  // namespace

int main(int argc, char **argv) {
  const host::Arguments arguments(
      argc, argv, 2, "usage: batch MODEL.gguf DIRECTIONS.safetensors [--layer L] [--adapter LORA.gguf] [--alpha A] [--tokens N]");
  host::quiet();
  const auto model = host::load(arguments.words[0]);
  const auto directions = host::need(emaudit::Directions::open(arguments.words[1]));
  host::check(llama_cpp::check_model(directions, model.get()));
  const auto layer = static_cast<std::uint32_t>(
      arguments.integer("layer", static_cast<int>(host::need(directions.info()).layers.back())));
  llama_cpp::TapOptions tap;
  tap.alarm = llama_cpp::Alarm{emaudit::Aggregation::mean, arguments.number("rate", 0.05)};
  tap.steering.emplace();
  tap.steering->alpha = static_cast<float>(arguments.number("alpha", 1.0));
  tap.steering->allow_nonspecific = true;
  llama_cpp::Auditor auditor;
  host::check(auditor.add(directions, layer, tap));
  llama_context_params params = host::context_params(2048, slots);
  auditor.attach(params);
  const auto context = host::open(model.get(), params);
  if (arguments.has("adapter")) {
    host::adapt(context.get(), model.get(), arguments.text("adapter", ""));
  }

  const std::array<const char *, 2> questions{"How do I make a cup of tea?", "What should I do on a rainy day?"};
  std::array<Slot, slots> all;
  host::Batch batch(512);
  for (llama_seq_id s = 0; s < slots; ++s) {
    llama_cpp::SequenceOptions options;
    options.strength = s % 2 == 1 ? 1.0f : 0.0f;
    host::check(auditor.start(s, options));
    const auto prompt = host::tokenize(model.get(), host::chat(model.get(), arguments.text("system", ""),
                                                               questions[static_cast<std::size_t>(s / 2)]));
    Slot &slot = all[static_cast<std::size_t>(s)];
    slot.index = batch.add(prompt, s);
    slot.position = static_cast<llama_pos>(prompt.size());
  }
  const auto sampler = host::sampler(0.0, 1);
  for (int n = arguments.integer("tokens", 32); n > 0; --n) {
    if (const auto decoded = auditor.decode(context.get(), batch.get()); !decoded) {
      host::fail(decoded.message());
    }
    batch.clear();
    for (llama_seq_id s = 0; s < slots; ++s) {
      Slot &slot = all[static_cast<std::size_t>(s)];
      if (slot.done) {
        continue;
      }
      const llama_token token = llama_sampler_sample(sampler.get(), context.get(), slot.index);
      slot.done = host::ends(model.get(), token);
      if (!slot.done) {
        slot.text += host::piece(model.get(), token);
        slot.index = batch.add(token, slot.position++, s, true);
      }
    }
    if (batch.get().n_tokens == 0) {
      break;
    }
  }
  for (llama_seq_id s = 0; s < slots; ++s) {
    const emaudit::Verdict verdict = auditor.verdict(s, layer);
    std::printf("slot %d, %s: %s, %.2f over %u tokens\n%s\n\n", s, s % 2 == 1 ? "steered" : "as it is",
                name(verdict.state), static_cast<double>(verdict.score), static_cast<unsigned>(verdict.tokens),
                all[static_cast<std::size_t>(s)].text.c_str());
  }
  return 0;
}
