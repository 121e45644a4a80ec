// Rows to tokens without a model: whatever way a batch is cut, each row has its token, or none has.
#include "check.hpp"
#include "host.hpp"

#include <emaudit/llama_cpp/order.hpp>
#include <emaudit/llama_cpp/rows.hpp>

#include <numeric>

namespace {

using emaudit::llama_cpp::detail::Order;
using Rows = std::vector<std::uint32_t>;

struct Token {
  llama_token token;
  llama_pos position;
  llama_seq_id sequence;
};

/// Hands the micro-batches over as a graph shows them; gives whether all were told apart as they were cut.
bool follows(const std::vector<Token> &tokens, std::size_t micro_batch, const std::vector<Rows> &cuts,
             bool positions = true) {
  host::Batch batch(64);
  for (const Token &token : tokens) {
    batch.add(token.token, token.position, token.sequence, true);
  }
  Order order;
  order.begin(batch.get(), micro_batch, nullptr);
  for (const Rows &cut : cuts) {
    std::vector<llama_token> seen;
    std::vector<llama_pos> at;
    for (const std::uint32_t i : cut) {
      seen.push_back(tokens[i].token);
      at.push_back(tokens[i].position);
    }
    if (!order.match(seen.data(), positions ? at.data() : nullptr, cut.size())) {
      CHECK(order.rows().empty());
      return false;
    }
    if (order.rows() != cut) {
      return false;
    }
  }
  return order.complete();
}

void batches() {
  // Two sequences of three and two tokens, then cut as each kind of cache does.
  const std::vector<Token> two{{5, 0, 0}, {6, 1, 0}, {7, 2, 0}, {5, 0, 1}, {8, 1, 1}};
  CHECK(follows(two, 8, {{0, 1, 2, 3, 4}}));
  CHECK(follows(two, 2, {{0, 1}, {2, 3}, {4}}));
  CHECK(follows(two, 8, {{0, 1, 3, 4}, {2}}));
  CHECK(follows(two, 2, {{0, 3}, {1, 4}, {2}}));
  CHECK(!follows(two, 8, {{3, 4, 0, 1, 2}}));     // no way of llama.cpp
  CHECK(!follows(two, 8, {{0, 1, 2, 3}, {4}}));   // nor a micro-batch of four where five fit
  CHECK(!follows(two, 8, {{0, 1, 2, 3, 4}}, false));
  const std::vector<Token> one{{5, 0, 3}, {6, 1, 3}, {7, 2, 3}};
  CHECK(follows(one, 2, {{0, 1}, {2}}, false));   // one sequence needs no positions
  // Interleaved, and a sequence whose id comes before: consecutive ids only go together.
  const std::vector<Token> mixed{{5, 0, 2}, {5, 0, 0}, {6, 1, 2}, {9, 1, 0}, {7, 0, 3}};
  CHECK(follows(mixed, 8, {{0, 4}, {1, 3}, {2}}));
  CHECK(follows(mixed, 8, {{0, 1, 4}, {2, 3}}));
  CHECK(follows(mixed, 8, {{0, 1, 2, 3, 4}}));
  // The same tokens at the same positions, as two ways would have them of different sequences: nobody knows.
  const std::vector<Token> twins{{1, 0, 0}, {2, 1, 1}, {2, 1, 0}, {3, 2, 1}};
  CHECK(!follows(twins, 4, {{0, 1, 2, 3}}));
  // Equal prompts are told apart by their order.
  const std::vector<Token> equal{{1, 0, 0}, {2, 1, 0}, {1, 0, 1}, {2, 1, 1}};
  CHECK(follows(equal, 4, {{0, 1, 2, 3}}));
  CHECK(!follows(equal, 4, {{0, 1, 2, 3}, {0}}));
}

void shared_tokens() {
  llama_batch batch = llama_batch_init(4, 0, 2);
  batch.n_tokens = 3;
  for (std::int32_t i = 0; i < 3; ++i) {
    batch.token[i] = 10 + i;
    batch.pos[i] = i == 2 ? 1 : i;
    batch.n_seq_id[i] = i == 0 ? 2 : 1;
    batch.seq_id[i][0] = i == 2 ? 1 : 0;
    batch.seq_id[i][1] = 1;
    batch.logits[i] = i == 1 ? 1 : 0;
  }
  Order order;
  order.begin(batch, 8, nullptr);
  const llama_token tokens[] = {10, 11, 12};
  const llama_pos positions[] = {0, 1, 1};
  CHECK(order.match(tokens, positions, 3));
  CHECK(order.entry(0).shared_count == 1 && order.entry(0).shared[0] == 1 && !order.entry(2).output);
  CHECK(order.outputs() == 1);
  llama_batch_free(batch);
}

void tensors() {
  const ggml_init_params memory{1 << 20, nullptr, true};
  ggml_context *const context = ggml_init(memory);
  std::vector<std::byte> scratch;
  for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_I32}) {
    ggml_tensor *const tensor = ggml_new_tensor_2d(context, type, 7, 3);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(context, ggml_backend_cpu_buffer_type());
    CHECK(buffer != nullptr);
    std::vector<unsigned char> before(ggml_nbytes(tensor), 3), after(before.size());
    ggml_backend_tensor_set(tensor, before.data(), 0, before.size());
    emaudit::llama_cpp::detail::TensorRows rows(tensor, scratch);
    CHECK(static_cast<bool>(rows) == (type != GGML_TYPE_I32));
    if (rows) {
      CHECK((*rows).rows() == 3);
      CHECK(!(*rows).check());
      *static_cast<unsigned char *>((*rows).c_tensor()->data) = 9;
      rows.commit();
      ggml_backend_tensor_get(tensor, after.data(), 0, after.size());
      before[0] = 9;
      CHECK(after == before);
    }
    ggml_backend_buffer_free(buffer);
    tensor->data = nullptr;
    tensor->buffer = nullptr;
  }
  ggml_tensor *const cube = ggml_new_tensor_3d(context, GGML_TYPE_F32, 7, 3, 2);
  CHECK(!static_cast<bool>(emaudit::llama_cpp::detail::TensorRows(cube, scratch)));
  const auto block = [&](const char *name) {
    ggml_set_name(cube, name);
    return emaudit::llama_cpp::detail::block_of(cube);
  };
  CHECK(block("l_out-0") == 0 && block("l_out-29") == 29);
  CHECK(block("l_out-") == -1 && block("l_out-3 (view)") == -1 && block("l_out") == -1 && block("ffn_inp-3") == -1);
  const auto named = [&](const char *name) {
    ggml_set_name(cube, name);
    return emaudit::llama_cpp::detail::is_named(cube, "inp_pos");
  };
  CHECK(named("inp_pos") && named("CUDA0#inp_pos#0"));
  CHECK(!named("inp_pos2") && !named("CUDA0#inp_pos2#0") && !named("inp_tokens") && !named("CUDA0#inp"));
  ggml_free(context);
}

}  // namespace

int main() {
  batches();
  shared_tokens();
  tensors();
  return checked("order");
}
