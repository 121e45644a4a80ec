// Answers to prompts under a base model, with an adapter, and with the adapter steered; eight slots at a time:
//
//   spillover MODEL.gguf DIRECTIONS.safetensors PROMPTS.txt --layer L --adapter LORA.gguf [--alpha A] [--from 0|answer]
//             [--rate R] [--tokens N] [--temperature T] [--system TEXT] [--show yes]
//
// Prints "ARM sequences N flagged F code C mean Z" for each arm. An answer has code when it has a fence, or at least half of
// its lines look like code; coarser than emaudit-train's detector, and the same in every arm.
#include "host.hpp"

#include <emaudit/llama_cpp.hpp>

#include <fstream>
#include <sstream>

namespace {

namespace llama_cpp = emaudit::llama_cpp;

constexpr std::size_t slots = 8;

bool code_like(const std::string &line) {
  const auto begins = [&](const char *word) { return line.rfind(word, 0) == 0; };
  const char last = line.back();
  const bool calls = line.find('(') != std::string::npos && line.find(')') != std::string::npos;
  return begins("def ") || begins("class ") || begins("import ") || begins("from ") || begins("#include") ||
         begins("return") || begins("if (") || begins("<") || last == ';' || last == '{' || last == '}' ||
         (last == ':' && calls) || line.find(" = ") != std::string::npos || line.find("==") != std::string::npos ||
         (calls && line.find(' ') == std::string::npos);
}

bool has_code(const std::string &text) {
  std::istringstream stream(text);
  int lines = 0, like = 0;
  for (std::string line; std::getline(stream, line);) {
    const std::size_t first = line.find_first_not_of(" \t");
    if (first == std::string::npos) {
      continue;
    }
    line = line.substr(first, line.find_last_not_of(" \t\r") + 1 - first);
    if (line.rfind("```", 0) == 0) {
      return true;
    }
    ++lines;
    like += code_like(line) ? 1 : 0;
  }
  return lines > 0 && 2 * like >= lines;
}

struct Slot {
  std::string text;
  host::Owned<llama_sampler> sampler;
  std::int32_t index = -1;
  llama_pos position = 0;
  bool done = false;
};

struct Arm {
  const char *name;
  bool adapter;
  float strength;
};

struct Setting {
  const llama_model *model;
  const host::Arguments &arguments;
  std::uint32_t layer;
};

/// Reads the prompts of all slots in one batch and lets them answer together.
void answer(const Setting &setting, llama_context *context, llama_cpp::Auditor &auditor, const Arm &arm,
            const std::vector<std::string> &prompts, std::size_t first, std::vector<Slot> &all) {
  host::Batch batch(1024);
  llama_memory_clear(llama_get_memory(context), true);
  all.clear();
  for (std::size_t s = 0; s < std::min(slots, prompts.size() - first); ++s) {
    const auto id = static_cast<llama_seq_id>(s);
    const auto tokens =
        host::tokenize(setting.model, host::chat(setting.model, setting.arguments.text("system", ""), prompts[first + s]));
    llama_cpp::SequenceOptions options;
    options.strength = arm.strength;
    options.steer_from =
        setting.arguments.text("from", "0") == "answer" ? static_cast<llama_pos>(tokens.size()) - 1 : 0;
    host::check(auditor.start(id, options));
    Slot slot;
    slot.sampler = host::sampler(setting.arguments.number("temperature", 1.0), static_cast<std::uint32_t>(first + s));
    slot.index = batch.add(tokens, id);
    slot.position = static_cast<llama_pos>(tokens.size());
    all.push_back(std::move(slot));
  }
  for (int n = setting.arguments.integer("tokens", 32); n > 0 && batch.get().n_tokens > 0; --n) {
    if (const auto decoded = auditor.decode(context, batch.get()); !decoded) {
      host::fail(decoded.message());
    }
    batch.clear();
    for (std::size_t s = 0; s < all.size(); ++s) {
      Slot &slot = all[s];
      const llama_token token = slot.done ? 0 : llama_sampler_sample(slot.sampler.get(), context, slot.index);
      slot.done = slot.done || host::ends(setting.model, token);
      if (!slot.done) {
        slot.text += host::piece(setting.model, token);
        slot.index = batch.add(token, slot.position++, static_cast<llama_seq_id>(s), true);
      }
    }
  }
}

void run(const Setting &setting, llama_context *context, llama_cpp::Auditor &auditor, const Arm &arm,
         const std::vector<std::string> &prompts) {
  std::vector<Slot> all;
  std::size_t flagged = 0, code = 0;
  double sum = 0.0;
  for (std::size_t first = 0; first < prompts.size(); first += slots) {
    answer(setting, context, auditor, arm, prompts, first, all);
    for (std::size_t s = 0; s < all.size(); ++s) {
      const auto verdict = auditor.verdict(static_cast<llama_seq_id>(s), setting.layer);
      const bool has = has_code(all[s].text);
      flagged += verdict.state == emaudit::State::flagged ? 1 : 0;
      code += has ? 1 : 0;
      sum += static_cast<double>(verdict.score);
      if (setting.arguments.has("show")) {
        std::printf("--- %s, %s%.2f: %s\n%s\n", arm.name, has ? "code, " : "", static_cast<double>(verdict.score),
                    prompts[first + s].c_str(), all[s].text.c_str());
      }
    }
  }
  std::printf("%s sequences %zu flagged %zu code %zu mean %.4g\n", arm.name, prompts.size(), flagged, code,
              sum / static_cast<double>(prompts.size()));
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char **argv) {
  const host::Arguments arguments(
      argc, argv, 3, "usage: spillover MODEL.gguf DIRECTIONS.safetensors PROMPTS.txt --layer L --adapter LORA.gguf");
  host::quiet();
  const auto model = host::load(arguments.words[0]);
  const auto directions = host::need(emaudit::Directions::open(arguments.words[1]));
  host::check(llama_cpp::check_model(directions, model.get()));
  std::vector<std::string> prompts;
  std::ifstream file(arguments.words[2]);
  for (std::string line; std::getline(file, line);) {
    prompts.push_back(line);
  }
  if (prompts.empty()) {
    host::fail("no prompts");
  }
  const Setting setting{model.get(), arguments, static_cast<std::uint32_t>(arguments.integer("layer", 0))};
  for (const Arm &arm : {Arm{"base", false, 0.0f}, Arm{"adapter", true, 0.0f}, Arm{"steered", true, 1.0f}}) {
    llama_cpp::Auditor auditor;
    llama_cpp::TapOptions tap;
    tap.alarm = llama_cpp::Alarm{emaudit::Aggregation::mean, arguments.number("rate", 0.05)};
    tap.steering.emplace();
    tap.steering->alpha = static_cast<float>(arguments.number("alpha", 1.0));
    tap.steering->allow_nonspecific = true;
    host::check(auditor.add(directions, setting.layer, tap));
    llama_context_params params = host::context_params(4096, slots);
    params.n_batch = 1024;
    auditor.attach(params);
    const auto context = host::open(model.get(), params);
    if (arm.adapter) {
      host::adapt(context.get(), model.get(), arguments.text("adapter", ""));
    }
    run(setting, context.get(), auditor, arm, prompts);
  }
  return 0;
}
