// The Auditor in a real model, against what llama.cpp gives without it:
//
//   attached MODEL.gguf CALM.safetensors ALARM.safetensors MIDDLE LAST
//
// Both files have directions for the blocks MIDDLE and LAST (the last one). The thresholds of CALM are never reached, those
// of ALARM always.
#include "check.hpp"
#include "host.hpp"

#include <emaudit/llama_cpp.hpp>

#include <cstring>
#include <new>

namespace {

std::size_t allocations = 0;

}  // namespace

void *operator new(std::size_t size) {
  ++allocations;
  if (void *const memory = std::malloc(size)) {
    return memory;
  }
  std::abort();
}
void operator delete(void *memory) noexcept { std::free(memory); }
void operator delete(void *memory, std::size_t) noexcept { std::free(memory); }

namespace {

namespace llama_cpp = emaudit::llama_cpp;
using Kind = llama_cpp::Decoded::Kind;
using Floats = std::vector<float>;

struct Fixture {
  host::Owned<llama_model> model;
  std::optional<emaudit::Directions> calm;
  std::optional<emaudit::Directions> alarm;
  std::uint32_t middle = 0;
  std::uint32_t last = 0;
  std::int32_t vocabulary = 0;
};

llama_cpp::TapOptions watching() {
  llama_cpp::TapOptions options;
  options.alarm = llama_cpp::Alarm{emaudit::Aggregation::mean, 0.01};
  return options;
}

llama_cpp::TapOptions steering(float alpha) {
  llama_cpp::TapOptions options = watching();
  options.steering.emplace();
  options.steering->alpha = alpha;
  options.steering->allow_nonspecific = true;
  return options;
}

/// How a context cuts batches.
struct Cut {
  bool unified;
  std::uint32_t micro_batch;
};

llama_context_params params_of(const Cut &cut, std::uint32_t sequences) {
  llama_context_params params = host::context_params(1024, sequences);
  params.kv_unified = cut.unified;
  params.n_ubatch = cut.micro_batch;
  return params;
}

Floats logits_of(const Fixture &fixture, llama_context *context, std::int32_t index) {
  const float *const logits = llama_get_logits_ith(context, index);
  CHECK(logits != nullptr);
  return Floats(logits, logits + fixture.vocabulary);
}

bool same_bits(const Floats &a, const Floats &b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

/// Three prompts of different lengths for the sequences 0 to 2, one after the other or in turns.
void fill(const Fixture &fixture, host::Batch &batch, bool in_turns, std::array<std::int32_t, 3> &ends) {
  const std::array<std::vector<llama_token>, 3> prompts{
      host::tokenize(fixture.model.get(), "The weather was fine, so we walked along the river."),
      host::tokenize(fixture.model.get(), "Water boils at a hundred degrees"),
      host::tokenize(fixture.model.get(), "The weather was fine, so they stayed at home and read a book or two, and later")};
  batch.clear();
  std::size_t longest = 0;
  for (const auto &prompt : prompts) {
    longest = std::max(longest, prompt.size());
  }
  const auto add = [&](std::size_t s, std::size_t i) {
    if (i < prompts[s].size()) {
      ends[s] = batch.add(prompts[s][i], static_cast<llama_pos>(i), static_cast<llama_seq_id>(s),
                          i + 1 == prompts[s].size());
    }
  };
  for (std::size_t outer = 0; outer < (in_turns ? longest : 3); ++outer) {
    for (std::size_t inner = 0; inner < (in_turns ? 3 : longest); ++inner) {
      add(in_turns ? inner : outer, in_turns ? outer : inner);
    }
  }
}

/// A context with or without an auditor; prompts in one batch, then `steps` greedy tokens of all three.
struct Run {
  std::vector<Floats> logits;  // of the sequences 0 to 2, step by step
  std::vector<llama_token> tokens;
  std::vector<llama_cpp::ScoredRow> rows;
};

Run run(const Fixture &fixture, const llama_context_params &params, llama_cpp::Auditor *auditor, bool in_turns,
        int steps) {
  const auto context = host::open(fixture.model.get(), params);
  host::Batch batch(256);
  std::array<std::int32_t, 3> ends{};
  std::array<llama_pos, 3> at{};
  fill(fixture, batch, in_turns, ends);
  for (std::size_t s = 0; s < 3; ++s) {
    at[s] = batch.get().pos[ends[s]] + 1;
  }
  Run run;
  for (int step = 0; step <= steps; ++step) {
    if (auditor == nullptr) {
      CHECK(llama_decode(context.get(), batch.get()) == 0);
    } else {
      const auto decoded = auditor->decode(context.get(), batch.get());
      CHECK(decoded.kind() == Kind::ok && decoded);
      run.rows.insert(run.rows.end(), auditor->rows().begin(), auditor->rows().end());
    }
    std::array<llama_token, 3> next{};
    for (std::size_t s = 0; s < 3; ++s) {
      run.logits.push_back(logits_of(fixture, context.get(), ends[s]));
      const Floats &logits = run.logits.back();
      next[s] = static_cast<llama_token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
      run.tokens.push_back(next[s]);
    }
    batch.clear();
    for (std::size_t s = 0; s < 3; ++s) {
      ends[s] = batch.add(next[s], at[s]++, static_cast<llama_seq_id>(s), true);
    }
  }
  return run;
}

/// Scored without an edit, or with strength 0, no bit of any logit changes; every token is scored once at each layer.
void unsteered_changes_nothing(const Fixture &fixture, const Cut &cut, bool in_turns) {
  llama_context_params params = params_of(cut, 3);
  const Run plain = run(fixture, params, nullptr, in_turns, 6);
  for (const float strength : {1.0f, 0.0f}) {
    llama_cpp::Auditor auditor;
    const auto options = strength == 1.0f ? watching() : steering(1.0f);
    host::check(auditor.add(*fixture.calm, fixture.middle, options));
    host::check(auditor.add(*fixture.calm, fixture.last, options));
    llama_context_params attached = params;
    auditor.attach(attached);
    for (llama_seq_id s = 0; s < 3; ++s) {
      llama_cpp::SequenceOptions sequence;
      sequence.strength = strength;
      host::check(auditor.start(s, sequence));
    }
    const Run audited = run(fixture, attached, &auditor, in_turns, 6);
    CHECK(audited.tokens == plain.tokens);
    for (std::size_t i = 0; i < plain.logits.size(); ++i) {
      CHECK(same_bits(audited.logits[i], plain.logits[i]));
    }
    for (llama_seq_id s = 0; s < 3; ++s) {
      llama_pos middle = 0, watched = 0;
      for (const auto &row : audited.rows) {
        if (row.sequence == s && row.layer == fixture.middle) {
          CHECK(row.position == middle++);  // all tokens, in order
        }
        watched += row.sequence == s && row.layer == fixture.last ? 1 : 0;
        CHECK(row.status == emaudit::RowStatus::ok && std::isfinite(row.score));
        CHECK(row.layer == fixture.middle || row.watched);  // the last block has the rows with logits alone
      }
      CHECK(watched == 7 && middle > 10);
      for (const std::uint32_t layer : {fixture.middle, fixture.last}) {
        const emaudit::Verdict verdict = auditor.verdict(s, layer);
        CHECK(verdict.state == emaudit::State::clean && verdict.tokens == 7 && verdict.layer == layer);
      }
    }
    CHECK(auditor.verdict(3, fixture.middle).state == emaudit::State::invalid);
    CHECK(auditor.verdict(0, fixture.middle + 1).state == emaudit::State::invalid);
  }
}

/// Steering one sequence changes its logits and no bit of the others': rows are told apart, whatever the cut.
void steering_finds_its_sequence(const Fixture &fixture, const Cut &cut, bool in_turns) {
  llama_context_params params = params_of(cut, 3);
  const Run plain = run(fixture, params, nullptr, in_turns, 0);
  for (const std::uint32_t layer : {fixture.middle, fixture.last}) {
    for (llama_seq_id chosen = 0; chosen < 3; ++chosen) {
      llama_cpp::Auditor auditor;
      host::check(auditor.add(*fixture.calm, layer, steering(8.0f)));
      llama_context_params attached = params;
      auditor.attach(attached);
      for (llama_seq_id s = 0; s < 3; ++s) {
        llama_cpp::SequenceOptions sequence;
        sequence.strength = s == chosen ? 1.0f : 0.0f;
        host::check(auditor.start(s, sequence));
      }
      const Run steered = run(fixture, attached, &auditor, in_turns, 0);
      for (llama_seq_id s = 0; s < 3; ++s) {
        const auto i = static_cast<std::size_t>(s);
        CHECK(same_bits(steered.logits[i], plain.logits[i]) == (s != chosen));
      }
    }
  }
}

/// What an edit adds to the scores of the next layer's rows is for the model; here: from where on it is made.
void steering_begins_where_it_is_told(const Fixture &fixture) {
  const auto tokens = host::tokenize(fixture.model.get(), "The weather was fine, so we walked along the river.");
  const auto scores = [&](llama_pos from, std::size_t *edited) {
    llama_cpp::Auditor auditor;
    host::check(auditor.add(*fixture.calm, fixture.middle, steering(8.0f)));
    host::check(auditor.add(*fixture.calm, fixture.last, {}));
    llama_context_params params = host::context_params(256, 1);
    auditor.attach(params);
    const auto context = host::open(fixture.model.get(), params);
    llama_cpp::SequenceOptions options;
    options.steer_from = from;
    options.watch_from = static_cast<llama_pos>(tokens.size()) - 4;
    host::check(auditor.start(0, options));
    host::Batch batch(64);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      batch.add(tokens[i], static_cast<llama_pos>(i), 0, true);
    }
    CHECK(auditor.decode(context.get(), batch.get()).kind() == Kind::ok);
    CHECK(auditor.verdict(0, fixture.middle).tokens == 4);  // where the monitor was told to begin
    Floats out;
    for (const auto &row : auditor.rows()) {
      if (row.layer == fixture.last) {
        out.push_back(row.score);
      }
    }
    *edited = tokens.size() - static_cast<std::size_t>(std::min<llama_pos>(from, static_cast<llama_pos>(tokens.size())));
    return out;
  };
  std::size_t none = 0, few = 0;
  const Floats plain = scores(1000, &none), late = scores(static_cast<llama_pos>(tokens.size()) - 2, &few);
  CHECK(none == 0 && few == 2 && plain.size() == tokens.size() && late.size() == plain.size());
  for (std::size_t i = 0; i < plain.size(); ++i) {
    CHECK((std::memcmp(&plain[i], &late[i], sizeof(float)) == 0) == (i + few < plain.size()));
  }
}

/// A caller's own callback, behind the auditor: it sees what it asked for, may edit, and may stop the graph.
struct Chained {
  int seen = 0;
  bool stop = false;
  float add = 0.0f;
};

bool chained(ggml_tensor *tensor, bool ask, void *data) {
  Chained &self = *static_cast<Chained *>(data);
  if (std::strcmp(tensor->name, "l_out-14") != 0) {
    return false;
  }
  if (!ask) {
    ++self.seen;
    if (self.add != 0.0f) {
      Floats rows(static_cast<std::size_t>(ggml_nelements(tensor)));
      ggml_backend_tensor_get(tensor, rows.data(), 0, ggml_nbytes(tensor));
      for (float &value : rows) {
        value += self.add;
      }
      ggml_backend_tensor_set(tensor, rows.data(), 0, ggml_nbytes(tensor));
    }
  }
  return ask || !self.stop;
}

void callbacks_are_chained(const Fixture &fixture) {
  const auto tokens = host::tokenize(fixture.model.get(), "Water boils at a hundred degrees");
  Chained user;
  llama_cpp::Auditor auditor;
  host::check(auditor.add(*fixture.calm, fixture.middle, watching()));
  llama_context_params params = host::context_params(256, 1);
  params.cb_eval = chained;
  params.cb_eval_user_data = &user;
  auditor.attach(params);
  const auto context = host::open(fixture.model.get(), params);
  host::Batch batch(64);
  batch.add(tokens, 0);
  const auto decode = [&] {
    llama_memory_clear(llama_get_memory(context.get()), true);
    return auditor.decode(context.get(), batch.get());
  };
  CHECK(decode().kind() == Kind::ok && user.seen == 1 && auditor.rows().size() == 0);  // not started: theirs alone
  host::check(auditor.start(0));
  CHECK(decode().kind() == Kind::ok && user.seen == 2);
  const float before = auditor.rows()[0].score;
  user.add = 1.0f;
  CHECK(decode().kind() == Kind::ok && auditor.rows()[0].score != before);  // what goes on is what is scored
  user.stop = true;
  const auto stopped = decode();
  CHECK(stopped.kind() == Kind::unaudited && !stopped && stopped.code() == 0);
  CHECK(auditor.verdict(0, fixture.middle).state == emaudit::State::invalid && auditor.trouble(0) != nullptr);
  user.stop = false;
  CHECK(decode().kind() == Kind::ok);
  CHECK(auditor.verdict(0, fixture.middle).state == emaudit::State::invalid);  // for the rest of the sequence
  host::check(auditor.start(0));
  CHECK(decode().kind() == Kind::ok && auditor.verdict(0, fixture.middle).state == emaudit::State::clean);
  // Past the auditor.
  CHECK(llama_decode(context.get(), llama_batch_get_one(batch.get().token, 1)) == 0);
  CHECK(auditor.verdict(0, fixture.middle).state == emaudit::State::invalid && auditor.trouble(0) != nullptr);
}

/// A block that appears in no graph is no clean layer, and what cannot be audited is refused.
void nothing_is_clean_by_silence(const Fixture &fixture) {
  const auto tokens = host::tokenize(fixture.model.get(), "Water boils at a hundred degrees");
  llama_cpp::Auditor auditor;
  CHECK(!auditor.add(*fixture.calm, 1000, {}));
  host::check(auditor.add(*fixture.calm, fixture.middle, watching()));
  CHECK(!auditor.add(*fixture.calm, fixture.middle, {}));
  llama_context_params params = host::context_params(512, 2);
  auditor.attach(params);
  const auto context = host::open(fixture.model.get(), params);
  CHECK(!auditor.start(-1));
  llama_cpp::SequenceOptions options;
  options.strength = std::nanf("");
  CHECK(!auditor.start(0, options));
  host::check(auditor.start(0));
  CHECK(!auditor.add(*fixture.calm, fixture.last, {}));
  Floats embeddings(static_cast<std::size_t>(llama_model_n_embd(fixture.model.get())), 0.1f);
  llama_batch raw = llama_batch_init(1, llama_model_n_embd(fixture.model.get()), 1);
  raw.n_tokens = 1;
  raw.pos[0] = 0;
  raw.n_seq_id[0] = 1;
  raw.seq_id[0][0] = 0;
  raw.logits[0] = 1;
  CHECK(auditor.decode(context.get(), raw).kind() == Kind::refused);
  llama_batch_free(raw);
  CHECK(auditor.verdict(0, fixture.middle).state == emaudit::State::invalid);  // nothing was seen yet
  host::Batch batch(300);
  for (int i = 0; i < 300; ++i) {
    batch.add(tokens[0], i, 1, i == 299);
  }
  CHECK(auditor.decode(context.get(), batch.get()).kind() == Kind::failed);  // more than the cells of a slot
  batch.clear();
  batch.add(tokens, 0);
  CHECK(auditor.decode(context.get(), batch.get()).kind() == Kind::ok);
  CHECK(auditor.verdict(0, fixture.middle).state == emaudit::State::clean);
  auditor.stop(0);
  batch.clear();
  batch.add(tokens[0], static_cast<llama_pos>(tokens.size()), 0, true);
  CHECK(auditor.decode(context.get(), batch.get()).kind() == Kind::ok && auditor.rows().size() == 0);
}

void a_block_cannot_be_overlooked(const Fixture &fixture) {
  llama_context_params params = params_of({false, 512}, 3);
  const Run plain = run(fixture, params, nullptr, false, 0);
  llama_cpp::Auditor auditor;
  host::check(auditor.add(*fixture.alarm, fixture.middle, watching()));
  auditor.attach(params);
  const auto context = host::open(fixture.model.get(), params);
  for (llama_seq_id s = 0; s < 3; ++s) {
    llama_cpp::SequenceOptions options;
    options.block = s == 1;
    host::check(auditor.start(s, options));
  }
  host::Batch batch(256);
  std::array<std::int32_t, 3> ends{};
  fill(fixture, batch, false, ends);
  const auto decoded = auditor.decode(context.get(), batch.get());
  CHECK(decoded.kind() == Kind::blocked && !decoded && decoded.code() == 0);
  CHECK(auditor.blocked(1) && !auditor.blocked(0) && !auditor.blocked(2));
  const auto *const vocab = llama_model_get_vocab(fixture.model.get());
  for (std::size_t s = 0; s < 3; ++s) {
    const Floats logits = logits_of(fixture, context.get(), ends[s]);
    CHECK(same_bits(logits, plain.logits[s]) == (s != 1));  // the others go on as if nothing were
    if (s == 1) {
      const auto greedy = static_cast<llama_token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
      CHECK(llama_vocab_is_eog(vocab, greedy));
      const auto sampler = host::sampler(1.0, 7);
      for (int i = 0; i < 20; ++i) {
        CHECK(llama_vocab_is_eog(vocab, llama_sampler_sample(sampler.get(), context.get(), ends[s])));
      }
    }
  }
  // It stays, until somebody looks.
  const llama_pos end = llama_memory_seq_pos_max(llama_get_memory(context.get()), 0) + 1;
  batch.clear();
  batch.add(5, end, 0, true);
  batch.add(5, llama_memory_seq_pos_max(llama_get_memory(context.get()), 1) + 1, 1, true);
  CHECK(auditor.decode(context.get(), batch.get()).kind() == Kind::refused);
  CHECK(llama_memory_seq_pos_max(llama_get_memory(context.get()), 0) == end - 1);  // nothing was computed
  CHECK(!auditor.start(1));
  auditor.stop(1);
  CHECK(auditor.blocked(1));
  batch.clear();
  batch.add(5, end, 0, true);
  CHECK(auditor.decode(context.get(), batch.get()).kind() == Kind::ok);  // flagged, and not told to block
  CHECK(auditor.verdict(0, fixture.middle).state == emaudit::State::flagged);
  const emaudit::Verdict verdict = auditor.acknowledge(1);
  CHECK(verdict.state == emaudit::State::flagged && verdict.tokens == 1 && verdict.layer == fixture.middle);
  CHECK(!auditor.blocked(1) && auditor.acknowledge(1).state == emaudit::State::invalid);
  host::check(auditor.start(1));
}

/// The callback of an auditor that has seen batches of this size allocates nothing.
struct Counted {
  ggml_backend_sched_eval_callback callback = nullptr;
  void *data = nullptr;
  std::size_t allocations = 0;
  std::size_t calls = 0;
};

bool counted(ggml_tensor *tensor, bool ask, void *data) {
  Counted &self = *static_cast<Counted *>(data);
  const std::size_t before = allocations;
  const bool answer = self.callback(tensor, ask, self.data);
  self.allocations += allocations - before;
  self.calls += ask ? 0 : 1;
  return answer;
}

void the_hot_path_does_not_allocate(const Fixture &fixture) {
  llama_cpp::Auditor auditor;
  for (const std::uint32_t layer : {fixture.middle, fixture.last}) {
    host::check(auditor.add(*fixture.calm, layer, steering(0.5f)));
  }
  llama_context_params params = params_of({false, 512}, 3);
  auditor.attach(params);
  Counted counting{params.cb_eval, params.cb_eval_user_data};
  params.cb_eval = counted;
  params.cb_eval_user_data = &counting;
  const auto context = host::open(fixture.model.get(), params);
  host::Batch batch(256);
  std::array<std::int32_t, 3> ends{};
  for (int round = 0; round < 3; ++round) {
    counting = Counted{counting.callback, counting.data};
    llama_memory_clear(llama_get_memory(context.get()), true);
    std::size_t in_start = allocations;
    for (llama_seq_id s = 0; s < 3; ++s) {
      llama_cpp::SequenceOptions options;
      options.strength = static_cast<float>(s);
      host::check(auditor.start(s, options));
    }
    in_start = allocations - in_start;
    fill(fixture, batch, false, ends);
    std::array<llama_pos, 3> at{};
    for (std::size_t s = 0; s < 3; ++s) {
      at[s] = batch.get().pos[ends[s]];
    }
    for (int step = 0; step < 4; ++step) {
      CHECK(auditor.decode(context.get(), batch.get()).kind() == Kind::ok);
      batch.clear();
      for (llama_seq_id s = 0; s < 3; ++s) {
        batch.add(5 + step, ++at[static_cast<std::size_t>(s)], s, true);
      }
    }
    CHECK(counting.calls >= 8);
    CHECK(round == 0 || (counting.allocations == 0 && in_start == 0));
  }
}

}  // namespace

int main(int argc, char **argv) {
  const host::Arguments arguments(argc, argv, 5, "usage: attached MODEL.gguf CALM ALARM MIDDLE LAST");
  host::quiet();
  Fixture fixture;
  fixture.model = host::load(arguments.words[0]);
  fixture.calm.emplace(host::need(emaudit::Directions::open(arguments.words[1])));
  fixture.alarm.emplace(host::need(emaudit::Directions::open(arguments.words[2])));
  fixture.middle = static_cast<std::uint32_t>(std::stoul(arguments.words[3]));
  fixture.last = static_cast<std::uint32_t>(std::stoul(arguments.words[4]));
  fixture.vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(fixture.model.get()));
  CHECK(fixture.last + 1 == static_cast<std::uint32_t>(llama_model_n_layer(fixture.model.get())));
  CHECK(host::need(llama_cpp::check_model(*fixture.calm, fixture.model.get())) == emaudit::Identity::variant);
  for (const Cut cut : {Cut{false, 512}, Cut{true, 512}, Cut{false, 8}, Cut{true, 8}}) {
    for (const bool in_turns : {false, true}) {
      unsteered_changes_nothing(fixture, cut, in_turns);
      steering_finds_its_sequence(fixture, cut, in_turns);
    }
  }
  steering_begins_where_it_is_told(fixture);
  callbacks_are_chained(fixture);
  nothing_is_clean_by_silence(fixture);
  a_block_cannot_be_overlooked(fixture);
  the_hot_path_does_not_allocate(fixture);
  return checked("attached");
}
