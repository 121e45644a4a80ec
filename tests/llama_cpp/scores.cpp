// Prints the scores of token ids, one "layer position score" a line:
//
//   scores MODEL.gguf DIRECTIONS.safetensors --ids "1 2 3" [--layers "14 29"] [--cache f32] [--adapter LORA.gguf]
//
// --cache f32 keeps keys and values in float32, for a comparison with engines that round nothing.
#include "host.hpp"

#include <emaudit/llama_cpp.hpp>

#include <sstream>

template <class T>
static std::vector<T> numbers(const std::string &text) {
  std::istringstream stream(text);
  std::vector<T> out;
  for (T value; stream >> value;) {
    out.push_back(value);
  }
  return out;
}

int main(int argc, char **argv) {
  const host::Arguments arguments(argc, argv, 2, "usage: scores MODEL.gguf DIRECTIONS.safetensors --ids \"1 2 3\"");
  host::quiet();
  const auto model = host::load(arguments.words[0]);
  const auto directions = host::need(emaudit::Directions::open(arguments.words[1]));
  if (const auto match = emaudit::llama_cpp::check_model(directions, model.get()); !match) {
    host::fail(match.error().message());
  }
  emaudit::llama_cpp::Auditor auditor;
  const auto all = host::need(directions.info()).layers;
  const auto layers = arguments.has("layers") ? numbers<std::uint32_t>(arguments.text("layers", "")) : all;
  for (const std::uint32_t layer : layers) {
    host::check(auditor.add(directions, layer));
  }
  llama_context_params params = host::context_params(512, 1);
  if (arguments.text("cache", "") == "f32") {
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;  // it would round keys and values to float16 all the same
  }
  auditor.attach(params);
  const auto context = host::open(model.get(), params);
  if (arguments.has("adapter")) {
    host::adapt(context.get(), model.get(), arguments.text("adapter", ""));
  }
  host::Batch batch(512);
  for (const llama_token token : numbers<llama_token>(arguments.text("ids", ""))) {
    batch.add(token, batch.get().n_tokens, 0, true);  // the last layer has those rows only that are asked for
  }
  host::check(auditor.start(0));
  if (const auto decoded = auditor.decode(context.get(), batch.get()); !decoded) {
    host::fail(decoded.message());
  }
  for (const auto &row : auditor.rows()) {
    std::printf("%u %d %.9g\n", static_cast<unsigned>(row.layer), row.position, static_cast<double>(row.score));
  }
  return 0;
}
