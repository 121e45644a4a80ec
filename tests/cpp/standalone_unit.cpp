// A second translation unit with the whole header in it (one definition rule), beside the header of the library,
// whose numbers must be the same; and what a caller can get wrong.
#include "emaudit.h"
#include "emaudit/standalone.hpp"

namespace sa = emaudit::standalone;

#define SAME(ours, theirs) static_assert(static_cast<long>(sa::ours) == (theirs), #theirs)
SAME(Status::ok, EMAUDIT_STATUS_OK);
SAME(Status::invalid_argument, EMAUDIT_STATUS_INVALID_ARGUMENT);
SAME(Status::io, EMAUDIT_STATUS_IO);
SAME(Status::not_a_direction_file, EMAUDIT_STATUS_NOT_A_DIRECTION_FILE);
SAME(Status::truncated, EMAUDIT_STATUS_TRUNCATED);
SAME(Status::malformed, EMAUDIT_STATUS_MALFORMED);
SAME(Status::unsupported_version, EMAUDIT_STATUS_UNSUPPORTED_VERSION);
SAME(Status::digest_mismatch, EMAUDIT_STATUS_DIGEST_MISMATCH);
SAME(Status::schema, EMAUDIT_STATUS_SCHEMA);
SAME(Status::model_mismatch, EMAUDIT_STATUS_MODEL_MISMATCH);
SAME(Status::width_mismatch, EMAUDIT_STATUS_WIDTH_MISMATCH);
SAME(Status::layer_not_found, EMAUDIT_STATUS_LAYER_NOT_FOUND);
SAME(Status::non_finite, EMAUDIT_STATUS_NON_FINITE);
SAME(Status::not_specific, EMAUDIT_STATUS_NOT_SPECIFIC);
SAME(Status::rate_unsupported, EMAUDIT_STATUS_RATE_UNSUPPORTED);
SAME(Dtype::f32, EMAUDIT_DTYPE_F32);
SAME(Dtype::f16, EMAUDIT_DTYPE_F16);
SAME(Dtype::bf16, EMAUDIT_DTYPE_BF16);
SAME(Unit::aligned_sd, EMAUDIT_UNIT_ALIGNED_SD);
SAME(Unit::raw, EMAUDIT_UNIT_RAW);
SAME(RowStatus::ok, EMAUDIT_ROW_OK);
SAME(RowStatus::non_finite, EMAUDIT_ROW_NON_FINITE);
SAME(Site::resid_post, EMAUDIT_SITE_RESID_POST);
SAME(Site::final_norm, EMAUDIT_SITE_FINAL_NORM);
SAME(Identity::exact, EMAUDIT_IDENTITY_EXACT);
SAME(Identity::variant, EMAUDIT_IDENTITY_VARIANT);
SAME(Specificity::untested, EMAUDIT_SPECIFICITY_UNTESTED);
SAME(Specificity::nonspecific, EMAUDIT_SPECIFICITY_NONSPECIFIC);
SAME(Specificity::specific, EMAUDIT_SPECIFICITY_SPECIFIC);
SAME(Aggregation::mean, EMAUDIT_AGGREGATION_MEAN);
SAME(Aggregation::max, EMAUDIT_AGGREGATION_MAX);
SAME(Aggregation::last, EMAUDIT_AGGREGATION_LAST);
SAME(State::invalid, EMAUDIT_STATE_INVALID);
SAME(State::pending, EMAUDIT_STATE_PENDING);
SAME(State::clean, EMAUDIT_STATE_CLEAN);
SAME(State::flagged, EMAUDIT_STATE_FLAGGED);

std::size_t rules_of_the_second_unit();

/// How many rules held; 0 when one did not.
std::size_t rules_of_the_second_unit() {
  std::size_t held = 0;
  const auto rule = [&held](bool holds) {
    if (!holds) std::abort();
    ++held;
  };
  rule(sa::Verdict{}.state == sa::State::invalid && sa::Verdict{}.score != sa::Verdict{}.score);
  rule(sa::Directions::from_bytes(nullptr, 0).status() == sa::Status::not_a_direction_file);
  const std::string abc = "abc";
  const auto *bytes = reinterpret_cast<const unsigned char *>(abc.data());
  const char *known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
  rule(sa::detail::hex(sa::detail::sha256(bytes, 3, 3)) == known);
  alignas(4) unsigned char memory[64] = {};
  const auto check = [&](const void *data, sa::Dtype dtype, std::size_t rows, std::size_t cols, std::size_t stride) {
    return sa::detail::check_rows({data, dtype, rows, cols, stride}, 4);
  };
  rule(check(memory, sa::Dtype::f32, 4, 4, 0) == sa::Status::ok);
  rule(check(memory + 1, sa::Dtype::f32, 1, 4, 0) == sa::Status::invalid_argument);
  rule(check(memory + 2, sa::Dtype::bf16, 1, 4, 0) == sa::Status::ok);
  rule(check(memory, sa::Dtype::f32, 2, 4, 3) == sa::Status::invalid_argument);
  rule(check(memory, sa::Dtype::f32, 2, 5, 0) == sa::Status::width_mismatch);
  rule(check(memory, sa::Dtype{}, 2, 5, 0) == sa::Status::invalid_argument);
  rule(check(nullptr, sa::Dtype::f16, 1, 4, 0) == sa::Status::invalid_argument);
  rule(check(nullptr, sa::Dtype::f16, 0, 4, 0) == sa::Status::ok);
  rule(check(memory, sa::Dtype::f32, SIZE_MAX, 4, 0) == sa::Status::invalid_argument);
  rule(check(memory, sa::Dtype::f32, 2, 4, SIZE_MAX) == sa::Status::invalid_argument);
  return held;
}
