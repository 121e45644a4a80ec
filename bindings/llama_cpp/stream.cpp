// A server in one slot: answers each line of standard input, streams the answer with the score beside each token, and
// ends it with the verdict.
//
//   stream MODEL.gguf DIRECTIONS.safetensors [--layer L] [--adapter LORA.gguf] [--steer ALPHA] [--rate R] [--block yes]
//          [--system TEXT] [--tokens N] [--temperature T] [--seed S] [--metrics FILE] [--log FILE]
//
// The score beside a token is that of the state in which it was chosen: token 1 of the answer has the one of the last
// prompt token. --steer subtracts ALPHA times the direction; --block ends an answer that is not clean.
#include "host.hpp"
#include "metrics.hpp"

#include <emaudit/llama_cpp.hpp>

#include <cmath>
#include <iostream>
#include <optional>

namespace {

namespace llama_cpp = emaudit::llama_cpp;

const char *const usage = "usage: stream MODEL.gguf DIRECTIONS.safetensors [--layer L] [--adapter LORA.gguf] [--steer ALPHA]"
                          " [--rate R] [--block yes] [--tokens N] [--metrics FILE] [--log FILE] < QUESTIONS";

struct Server {
  host::Owned<llama_model> model;
  llama_cpp::Auditor auditor;
  host::Owned<llama_context> context;
  host::Batch batch{512};
  std::uint32_t layer = 0;
  Metrics metrics;
  std::optional<emaudit::Log> log;
  int requests = 0;
};

/// The score of the last token that the model read.
double last_score(const llama_cpp::Auditor &auditor) {
  const auto rows = auditor.rows();
  return rows.size() == 0 ? std::nan("") : static_cast<double>(rows[rows.size() - 1].score);
}

/// One answer, token by token.
void answer(Server &server, const std::string &question, const host::Arguments &arguments) {
  const llama_model *const model = server.model.get();
  const std::vector<llama_token> prompt =
      host::tokenize(model, host::chat(model, arguments.text("system", ""), question));
  llama_cpp::SequenceOptions options;
  options.block = arguments.has("block");
  host::check(server.auditor.start(0, options));
  llama_memory_clear(llama_get_memory(server.context.get()), true);
  const auto sampler = host::sampler(arguments.number("temperature", 0.0),
                                     static_cast<std::uint32_t>(arguments.integer("seed", 1)));
  server.batch.clear();
  std::int32_t last = server.batch.add(prompt, 0);
  auto position = static_cast<llama_pos>(prompt.size());
  for (int n = arguments.integer("tokens", 64); n > 0; --n) {
    const llama_cpp::Decoded decoded = server.auditor.decode(server.context.get(), server.batch.get());
    server.metrics.decoded(decoded, server.auditor.rows());
    if (!decoded) {
      std::printf("-- %s\n", decoded.message());
      break;
    }
    const llama_token token = llama_sampler_sample(sampler.get(), server.context.get(), last);
    if (host::ends(model, token)) {
      break;
    }
    std::printf("%9.2f  %s\n", last_score(server.auditor), host::piece(model, token).c_str());
    std::fflush(stdout);
    server.batch.clear();
    last = server.batch.add(token, position++, 0, true);
  }
}

void conclude(Server &server, const std::string &question) {
  const bool blocked = server.auditor.blocked(0);
  const emaudit::Verdict verdict =
      blocked ? server.auditor.acknowledge(0) : server.auditor.verdict(0, server.layer);
  server.metrics.ended(verdict);
  if (server.log) {
    host::check(server.log->append("request " + std::to_string(server.requests), verdict));
  }
  ++server.requests;
  std::printf("== %s%s after %u tokens: %.2f against %.2f, at most %g %% of calm answers; layer %u; \"%s\"\n",
              name(verdict.state), blocked ? " and blocked" : "", static_cast<unsigned>(verdict.tokens),
              static_cast<double>(verdict.score), static_cast<double>(verdict.threshold), 100.0 * verdict.rate,
              static_cast<unsigned>(server.layer), question.c_str());
}

}  // namespace

int main(int argc, char **argv) {
  const host::Arguments arguments(argc, argv, 2, usage);
  host::quiet();
  Server server;
  server.model = host::load(arguments.words[0]);
  const auto directions = host::need(emaudit::Directions::open(arguments.words[1]));
  host::check(llama_cpp::check_model(directions, server.model.get()));
  server.layer = static_cast<std::uint32_t>(
      arguments.integer("layer", static_cast<int>(host::need(directions.info()).layers.back())));
  llama_cpp::TapOptions tap;
  tap.alarm = llama_cpp::Alarm{emaudit::Aggregation::mean, arguments.number("rate", 0.05)};
  if (arguments.has("steer")) {
    tap.steering.emplace();
    tap.steering->alpha = static_cast<float>(arguments.number("steer", 1.0));
    tap.steering->allow_nonspecific = true;
  }
  host::check(server.auditor.add(directions, server.layer, tap));
  llama_context_params params = host::context_params(512, 1);
  server.auditor.attach(params);
  server.context = host::open(server.model.get(), params);
  if (arguments.has("log")) {
    server.log.emplace(host::need(emaudit::Log::open(arguments.text("log", ""))));
  }
  if (arguments.has("adapter")) {
    host::adapt(server.context.get(), server.model.get(), arguments.text("adapter", ""));
  }
  for (std::string question; std::getline(std::cin, question);) {
    answer(server, question, arguments);
    conclude(server, question);
    if (arguments.has("metrics") && !server.metrics.write(arguments.text("metrics", ""))) {
      host::fail("cannot write " + arguments.text("metrics", ""));
    }
  }
  return 0;
}
