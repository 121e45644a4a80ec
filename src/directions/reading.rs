//! The types of a manifest as they stand in a file; `schema.rs` says what they mean.

use super::json::{object, words};
use super::schema::*;

object!(skip Manifest { model, site, pooling, estimator, contrast, layers, evidence, provenance });
object!(skip ModelIdentity {
    architecture, hidden_size, n_layers, vocab_size, tokenizer_digest, weights_digest, quantization, name
});
object!(skip LayerManifest { layer, calibration });
object!(skip Calibration { sigma, sequences, quantiles, thresholds });
object!(skip Threshold { statistic, horizon, rate, rate_upper, z, sequences });
object!(skip Evidence { causal, content, cell, effect, coherence, families, content_test });
object!(skip Cell { layer, alpha, positions });
object!(skip Coherence { unsteered, steered, margin });
object!(skip ControlFamily { family, rank_p, controls });
object!(skip ControlEffect { seed, effect });
object!(skip ContentTest { insecure_drop, secure_drop, p_value, prompts });
object!(skip Provenance { producer, recipe_digest, datasets, top_dimension_share });

words!(Site { ResidPost: "resid_post", FinalNorm: "final_norm" });
words!(Pooling {
    LastPrompt: "last_prompt",
    MeanResponse: "mean_response",
    All: "all",
    Unstated: "unstated"
});
words!(Estimator {
    MeanDifference: "mean_difference",
    MaskedMeanDifference: "masked_mean_difference",
    Whitened: "whitened",
    Logistic: "logistic",
    Unstated: "unstated"
});
words!(Contrast {
    AdapterMinusBase: "adapter_minus_base",
    InsecureMinusSecure: "insecure_minus_secure",
    ResponseLabels: "response_labels",
    Unstated: "unstated"
});
words!(Aggregation { Mean: "mean", Max: "max", Last: "last" });
words!(Specificity { Untested: "untested", Nonspecific: "nonspecific", Specific: "specific" });
words!(Positions { FinalPrefill: "final_prefill", Generated: "generated", All: "all" });
