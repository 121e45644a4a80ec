// What the programs here need of llama.cpp as any host does: model, adapter, context, chat prompt, batch, text.
#ifndef HOST_HPP
#define HOST_HPP

#include <llama.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace host {

[[noreturn]] inline void fail(const std::string &sentence) {
  std::fprintf(stderr, "%s\n", sentence.c_str());
  std::exit(2);
}

/// The value of an emaudit result, or the end of the program with its sentence.
template <class Result>
auto need(Result result) {
  if (!result) {
    fail(result.error().message());
  }
  return std::move(result).value();
}
template <class Result>
void check(const Result &result) {
  if (!result) {
    fail(result.error().message());
  }
}

/// Words of the command line in order, and "--name value" pairs.
struct Arguments {
  std::vector<std::string> words;
  std::map<std::string, std::string> options;

  Arguments(int argc, char **argv, std::size_t count, const char *usage) {
    for (int i = 1; i < argc; ++i) {
      const std::string word = argv[i];
      if (word.rfind("--", 0) == 0 && i + 1 < argc) {
        options[word.substr(2)] = argv[++i];
      } else {
        words.push_back(word);
      }
    }
    if (words.size() < count) {
      fail(usage);
    }
  }

  bool has(const std::string &name) const { return options.count(name) != 0; }
  std::string text(const std::string &name, const std::string &otherwise) const {
    const auto found = options.find(name);
    return found == options.end() ? otherwise : found->second;
  }
  double number(const std::string &name, double otherwise) const {
    return has(name) ? std::strtod(options.at(name).c_str(), nullptr) : otherwise;
  }
  int integer(const std::string &name, int otherwise) const { return static_cast<int>(number(name, otherwise)); }
};

struct Deleter {
  void operator()(llama_model *model) const { llama_model_free(model); }
  void operator()(llama_context *context) const { llama_free(context); }
  void operator()(llama_adapter_lora *adapter) const { llama_adapter_lora_free(adapter); }
  void operator()(llama_sampler *sampler) const { llama_sampler_free(sampler); }
};
template <class T>
using Owned = std::unique_ptr<T, Deleter>;

/// llama.cpp says a lot; errors are enough.
inline void quiet() {
  llama_log_set([](ggml_log_level level, const char *text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
      std::fputs(text, stderr);
    }
  }, nullptr);
}

inline Owned<llama_model> load(const std::string &path) {
  Owned<llama_model> model(llama_model_load_from_file(path.c_str(), llama_model_default_params()));
  if (!model) {
    fail("llama.cpp cannot load " + path);
  }
  return model;
}

/// One thread, `sequences` slots, room for `tokens` in all.
inline llama_context_params context_params(std::uint32_t tokens, std::uint32_t sequences) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = tokens;
  params.n_batch = params.n_ubatch = std::min(tokens, 512u);
  params.n_seq_max = sequences;
  params.n_threads = params.n_threads_batch = 1;
  return params;
}

inline Owned<llama_context> open(llama_model *model, const llama_context_params &params) {
  Owned<llama_context> context(llama_init_from_model(model, params));
  if (!context) {
    fail("llama.cpp makes no context");
  }
  return context;
}

/// Puts a LoRA adapter in GGUF on a context; the model owns it.
inline void adapt(llama_context *context, llama_model *model, const std::string &path) {
  llama_adapter_lora *adapter = llama_adapter_lora_init(model, path.c_str());
  float scale = 1.0f;
  if (adapter == nullptr || llama_set_adapters_lora(context, &adapter, 1, &scale) != 0) {
    fail("llama.cpp cannot use the adapter " + path);
  }
}

inline std::vector<llama_token> tokenize(const llama_model *model, const std::string &text) {
  const llama_vocab *const vocab = llama_model_get_vocab(model);
  std::vector<llama_token> tokens(text.size() + 8);
  const int count = llama_tokenize(vocab, text.c_str(), static_cast<std::int32_t>(text.size()), tokens.data(),
                                   static_cast<std::int32_t>(tokens.size()), false, true);
  if (count <= 0) {
    fail("the text has no tokens");
  }
  tokens.resize(static_cast<std::size_t>(count));
  return tokens;
}

/// The prompt of one question by the model's chat template, up to where the answer begins.
inline std::string chat(const llama_model *model, const std::string &system, const std::string &question) {
  std::vector<llama_chat_message> messages;
  if (!system.empty()) {
    messages.push_back({"system", system.c_str()});
  }
  messages.push_back({"user", question.c_str()});
  std::string text(2 * (system.size() + question.size()) + 512, '\0');
  const int size =
      llama_chat_apply_template(llama_model_chat_template(model, nullptr), messages.data(), messages.size(), true,
                                text.data(), static_cast<std::int32_t>(text.size()));
  if (size < 0 || static_cast<std::size_t>(size) > text.size()) {
    fail("llama.cpp does not know the model's chat template");
  }
  text.resize(static_cast<std::size_t>(size));
  return text;
}

inline std::string piece(const llama_model *model, llama_token token) {
  char text[256];
  const int size = llama_token_to_piece(llama_model_get_vocab(model), token, text, sizeof text, 0, true);
  return size > 0 ? std::string(text, static_cast<std::size_t>(size)) : std::string();
}

inline bool ends(const llama_model *model, llama_token token) {
  return llama_vocab_is_eog(llama_model_get_vocab(model), token);
}

/// A llama_batch that grows.
class Batch {
 public:
  explicit Batch(std::int32_t capacity) : batch_(llama_batch_init(capacity, 0, 1)), capacity_(capacity) {}
  ~Batch() { llama_batch_free(batch_); }
  Batch(const Batch &) = delete;
  Batch &operator=(const Batch &) = delete;

  void clear() { batch_.n_tokens = 0; }
  /// Gives the index of the token in the batch.
  std::int32_t add(llama_token token, llama_pos position, llama_seq_id sequence, bool output) {
    const std::int32_t i = batch_.n_tokens++;
    if (i >= capacity_) {
      fail("the prompt does not fit into the batch");
    }
    batch_.token[i] = token;
    batch_.pos[i] = position;
    batch_.n_seq_id[i] = 1;
    batch_.seq_id[i][0] = sequence;
    batch_.logits[i] = output ? 1 : 0;
    return i;
  }
  /// A prompt; the logits of its last token are asked for.
  std::int32_t add(const std::vector<llama_token> &tokens, llama_seq_id sequence) {
    std::int32_t last = -1;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      last = add(tokens[i], static_cast<llama_pos>(i), sequence, i + 1 == tokens.size());
    }
    return last;
  }
  const llama_batch &get() const { return batch_; }

 private:
  llama_batch batch_;
  std::int32_t capacity_;
};

/// A sampler with a seed; temperature 0 takes the most likely token.
inline Owned<llama_sampler> sampler(double temperature, std::uint32_t seed) {
  Owned<llama_sampler> chain(llama_sampler_chain_init(llama_sampler_chain_default_params()));
  if (temperature > 0.0) {
    llama_sampler_chain_add(chain.get(), llama_sampler_init_temp(static_cast<float>(temperature)));
    llama_sampler_chain_add(chain.get(), llama_sampler_init_dist(seed));
  } else {
    llama_sampler_chain_add(chain.get(), llama_sampler_init_greedy());
  }
  return chain;
}

}  // namespace host

#endif  // HOST_HPP
