// Does a control vector that `emaudit convert export` wrote do in llama.cpp what emaudit does?
//
//   control_vector MODEL.gguf DIRECTIONS.safetensors VECTOR.gguf LAYER ALPHA
//
// VECTOR.gguf holds the direction of LAYER alone. Three passes over the same tokens, one thread:
//   plain    nothing is edited
//   vector   llama.cpp's own control vector, at the scale -ALPHA
//   steered  emaudit subtracts ALPHA v from the output of block LAYER, in the eval callback
// Compared are `vector` and `steered`: what the edit moved, at the layer itself and at every later one, and the logits.
// Exit status 0 when they agree within the bound that the two orders of rounding allow at LAYER. CONTRIBUTING.md has
// the commands.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emaudit.hpp"
#include "ggml-backend.h"
#include "gguf.h"
#include "llama.h"

namespace {

[[noreturn]] void fail(const std::string &sentence) {
  std::fprintf(stderr, "control_vector: %s\n", sentence.c_str());
  std::exit(2);
}

using Rows = std::vector<float>;

// What the eval callback does: copy the output of every block, and steer one of them.
struct Tap {
  std::map<int, Rows> outputs;
  const emaudit::Steering *steering = nullptr;
  int layer = -1;
};

int block_of(const ggml_tensor *tensor) {
  int block = -1;
  char rest = 0;
  return std::sscanf(tensor->name, "l_out-%d%c", &block, &rest) == 1 ? block : -1;
}

bool observe(ggml_tensor *tensor, bool ask, void *data) {
  const int block = block_of(tensor);
  if (ask) {
    return block >= 0;
  }
  if (tensor->type != GGML_TYPE_F32 || !ggml_is_contiguous(tensor)) {
    fail("a block's output is not contiguous float32");
  }
  Tap &tap = *static_cast<Tap *>(data);
  Rows rows(static_cast<std::size_t>(ggml_nelements(tensor)));
  ggml_backend_tensor_get(tensor, rows.data(), 0, ggml_nbytes(tensor));
  if (tap.steering != nullptr && block == tap.layer) {
    const auto width = static_cast<std::size_t>(tensor->ne[0]);
    const auto view = emaudit::MutableRows::f32(rows.data(), rows.size() / width, width);
    const auto steered = tap.steering->apply(view);
    if (!steered) {
      fail(steered.error().message());
    }
    ggml_backend_tensor_set(tensor, rows.data(), 0, ggml_nbytes(tensor));
  }
  tap.outputs[block] = std::move(rows);
  return true;
}

// As llama.cpp reads control vectors: [n_embd x (n_layer - 1)], layer 1 first.
std::vector<float> read_vector(const char *path, float scale, int width) {
  ggml_context *tensors = nullptr;
  std::unique_ptr<gguf_context, decltype(&gguf_free)> file(gguf_init_from_file(path, {false, &tensors}), gguf_free);
  if (!file) {
    fail(std::string("llama.cpp cannot read ") + path);
  }
  const std::unique_ptr<ggml_context, decltype(&ggml_free)> owner(tensors, ggml_free);
  std::vector<float> data;
  for (std::int64_t i = 0; i < gguf_get_n_tensors(file.get()); ++i) {
    const char *name = gguf_get_tensor_name(file.get(), i);
    const ggml_tensor *tensor = ggml_get_tensor(tensors, name);
    int layer = 0;
    if (std::sscanf(name, "direction.%d", &layer) != 1 || layer < 1 || tensor->type != GGML_TYPE_F32 ||
        ggml_n_dims(tensor) != 1 || ggml_nelements(tensor) != width) {
      fail(std::string(name) + " is not a direction of this model");
    }
    const auto at = static_cast<std::size_t>(width) * static_cast<std::size_t>(layer - 1);
    data.resize(std::max(data.size(), at + static_cast<std::size_t>(width)), 0.0f);
    const auto *values = static_cast<const float *>(tensor->data);
    for (int j = 0; j < width; ++j) {
      data[at + static_cast<std::size_t>(j)] += values[j] * scale;
    }
  }
  return data;
}

// One pass over the tokens; the logits of all of them.
Rows decode(llama_model *model, std::vector<llama_token> tokens, Tap &tap, const std::vector<float> *vector) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = 512;
  params.n_threads = params.n_threads_batch = 1;
  params.cb_eval = observe;
  params.cb_eval_user_data = &tap;
  const std::unique_ptr<llama_context, decltype(&llama_free)> context(llama_init_from_model(model, params), llama_free);
  if (!context) {
    fail("no context");
  }
  if (vector != nullptr && llama_set_adapter_cvec(context.get(), vector->data(), vector->size(),
                                                  llama_model_n_embd(model), 1, llama_model_n_layer(model)) != 0) {
    fail("llama.cpp refuses the control vector");
  }
  llama_batch batch = llama_batch_init(static_cast<std::int32_t>(tokens.size()), 0, 1);
  for (const llama_token token : tokens) {
    const std::int32_t i = batch.n_tokens++;
    batch.token[i] = token;
    batch.pos[i] = i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = 1;  // the last block carries only the rows that are asked for
  }
  if (llama_decode(context.get(), batch) != 0) {
    fail("decoding failed");
  }
  llama_batch_free(batch);
  const auto count = tokens.size() * static_cast<std::size_t>(llama_vocab_n_tokens(llama_model_get_vocab(model)));
  const float *logits = llama_get_logits(context.get());
  return Rows(logits, logits + count);
}

struct Gap {
  double largest = 0.0;
  double norm = 0.0;
  std::size_t different = 0;
};

Gap between(const Rows &a, const Rows &b) {
  if (a.size() != b.size()) {
    fail("two passes differ in shape");
  }
  Gap gap;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    gap.largest = std::fmax(gap.largest, std::fabs(d));
    gap.norm += d * d;
    gap.different += std::memcmp(&a[i], &b[i], sizeof(float)) != 0;
  }
  gap.norm = std::sqrt(gap.norm);
  return gap;
}

void print(const char *name, const Rows &plain, const Rows &vector, const Rows &steered) {
  const Gap moved = between(vector, plain), gap = between(vector, steered);
  std::printf("%-10s  moved by %12.6g  apart by %12.6g  largest %10.3g  %zu of %zu values differ\n", name, moved.norm,
              gap.norm, gap.largest, gap.different, vector.size());
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 6) {
    fail("usage: control_vector MODEL.gguf DIRECTIONS.safetensors VECTOR.gguf LAYER ALPHA");
  }
  const int layer = std::atoi(argv[4]);
  const float alpha = std::strtof(argv[5], nullptr);
  llama_log_set([](ggml_log_level level, const char *text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
      std::fputs(text, stderr);
    }
  }, nullptr);
  const std::unique_ptr<llama_model, decltype(&llama_model_free)> model(
      llama_model_load_from_file(argv[1], llama_model_default_params()), llama_model_free);
  if (!model) {
    fail(std::string("cannot load ") + argv[1]);
  }
  const int width = llama_model_n_embd(model.get());

  auto directions = emaudit::Directions::open(argv[2]);
  auto probe = emaudit::Probe::make(directions.value(), static_cast<std::uint32_t>(layer));
  emaudit::SteeringOptions options;
  options.alpha = alpha;
  options.allow_nonspecific = true;
  auto steering = emaudit::Steering::make(probe.value(), options);
  Rows direction(static_cast<std::size_t>(width));
  emaudit_error *error = nullptr;
  if (emaudit_directions_copy_vectors(directions->get(), static_cast<std::uint32_t>(layer), direction.data(), nullptr,
                                      direction.size(), &error) != EMAUDIT_STATUS_OK) {
    fail(emaudit_error_message(error));
  }

  const std::string text = "The weather was fine, so we walked along the river and talked about the week ahead.";
  std::vector<llama_token> tokens(256);
  tokens.resize(static_cast<std::size_t>(std::max(
      0, llama_tokenize(llama_model_get_vocab(model.get()), text.c_str(), static_cast<std::int32_t>(text.size()),
                        tokens.data(), static_cast<std::int32_t>(tokens.size()), true, false))));
  if (tokens.empty()) {
    fail("no tokens");
  }

  Tap plain, vector, steered;
  steered.steering = &steering.value();
  steered.layer = layer;
  const std::vector<float> data = read_vector(argv[3], -alpha, width);
  const Rows logits_plain = decode(model.get(), tokens, plain, nullptr);
  const Rows logits_vector = decode(model.get(), tokens, vector, &data);
  const Rows logits_steered = decode(model.get(), tokens, steered, nullptr);

  double norm = 0.0;
  for (const float v : direction) {
    norm += static_cast<double>(v) * v;
  }
  std::printf("%zu tokens, layer %d of %d, alpha %g; alpha |v| sqrt(tokens) = %.6g\n", tokens.size(), layer,
              llama_model_n_layer(model.get()), static_cast<double>(alpha),
              std::fabs(static_cast<double>(alpha)) * std::sqrt(norm * static_cast<double>(tokens.size())));
  for (const auto &[block, rows] : plain.outputs) {
    if (block >= layer) {
      print(("l_out-" + std::to_string(block)).c_str(), rows, vector.outputs[block], steered.outputs[block]);
    }
  }
  print("logits", logits_plain, logits_vector, logits_steered);

  // llama.cpp rounds alpha v and then the sum; emaudit may round once. Each is off by at most half an ulp of what it
  // rounded, so two edits of one row are apart by at most u |alpha v| + 2 u |h - alpha v|, u = 2^-24.
  if (plain.outputs.count(layer) == 0) {
    fail("the layer was never computed");
  }
  const Rows &before = plain.outputs[layer], &a = vector.outputs[layer], &b = steered.outputs[layer];
  std::size_t outside = 0;
  for (std::size_t i = 0; i < before.size(); ++i) {
    const double step = static_cast<double>(alpha) * direction[i % direction.size()];
    const double bound = (std::fabs(step) + 2.0 * std::fabs(before[i] - step)) * 0x1p-24 * 1.0001;
    outside += !(std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i])) <= bound);
  }
  // Without this, two passes that edited nothing would agree.
  const bool edited = between(a, before).norm > 0.0;
  std::printf("%s: %zu of %zu values beyond the bound of rounding\n", outside == 0 && edited ? "agree" : "DISAGREE",
              outside, before.size());
  return outside == 0 && edited ? 0 : 1;
}
