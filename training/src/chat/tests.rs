use std::collections::HashMap;

use candle_core::quantized::gguf_file::{Content, Value, VersionedMagic};

use super::*;

const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The byte alphabet of byte-level BPE, in the order of the bytes.
fn byte_alphabet() -> Vec<String> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut shifted = 256;
    (0..256)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                shifted += 1;
                shifted - 1
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect()
}

/// A GGUF header with one token per byte, a few specials and two merges.
fn content(edit: impl FnOnce(&mut HashMap<String, Value>)) -> Content {
    let mut tokens = vec!["<|endoftext|>".to_owned(), "<|im_start|>".to_owned(), "<|im_end|>".to_owned()];
    tokens.extend(byte_alphabet());
    tokens.extend(["he", "hey", "ĊĊ"].map(str::to_owned));
    let types = (0..tokens.len()).map(|i| Value::I32(if i < 3 { 3 } else { 1 })).collect();
    let string = |s: &str| Value::String(s.to_owned());
    let mut metadata = HashMap::from([
        ("tokenizer.ggml.model".to_owned(), string("gpt2")),
        ("tokenizer.ggml.pre".to_owned(), string("smollm")),
        ("tokenizer.ggml.tokens".to_owned(), Value::Array(tokens.into_iter().map(Value::String).collect())),
        ("tokenizer.ggml.token_type".to_owned(), Value::Array(types)),
        (
            "tokenizer.ggml.merges".to_owned(),
            Value::Array(["h e", "he y", "Ċ Ċ"].iter().map(|m| string(m)).collect()),
        ),
        ("tokenizer.ggml.bos_token_id".to_owned(), Value::U32(1)),
        ("tokenizer.ggml.eos_token_id".to_owned(), Value::U32(2)),
        ("tokenizer.ggml.padding_token_id".to_owned(), Value::U32(2)),
        ("tokenizer.chat_template".to_owned(), string(SMOLLM2)),
    ]);
    edit(&mut metadata);
    Content { magic: VersionedMagic::GgufV3, metadata, tensor_infos: HashMap::new(), tensor_data_offset: 0 }
}

fn frontend() -> TextFrontend {
    TextFrontend::from_gguf(&content(|_| ())).unwrap()
}

fn refusal(edit: impl FnOnce(&mut HashMap<String, Value>)) -> String {
    format!("{:#}", TextFrontend::from_gguf(&content(edit)).unwrap_err())
}

#[test]
fn the_default_models_template_renders_as_in_transformers() {
    let text = frontend().render_prompt(&[Message::user("hey")]).unwrap();
    // transformers 5.23, apply_chat_template(tokenize=False, add_generation_prompt=True).
    assert_eq!(
        text,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nhey<|im_end|>\n<|im_start|>assistant\n"
    );
    let turns = [
        Message::new("system", "Be brief."),
        Message::user("hey"),
        Message::assistant("Hi!"),
        Message::user("2+2?"),
    ];
    assert_eq!(
        frontend().render_prompt(&turns).unwrap(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhey<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n\
         <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn encoding_and_decoding_are_inverse() {
    let text = frontend();
    for sample in [
        "hey",
        "  two  spaces\n\n\tdef f(x):",
        "naïve café — 東京 🙂",
        "<|im_start|>user\nhey<|im_end|>\n",
        "",
    ] {
        let ids = text.encode(sample).unwrap();
        assert_eq!(text.decode(&ids, false).unwrap(), sample);
    }
    assert_eq!(text.encode("hey").unwrap(), [260]);
    assert_eq!(text.decode(&text.encode("<|im_start|>hey<|im_end|>").unwrap(), true).unwrap(), "hey");
    assert!(text.decode(&[1_000_000], false).is_err());
}

#[test]
fn the_mask_covers_the_answer_and_its_end_of_turn() {
    let text = frontend();
    let tokens = text.encode_chat(&[Message::user("hey"), Message::assistant("he\nhey")]).unwrap();
    assert_eq!(tokens.ids.len(), tokens.response_mask.len());
    let masked: Vec<u32> =
        tokens.ids.iter().zip(&tokens.response_mask).filter(|(_, m)| **m).map(|(id, _)| *id).collect();
    assert_eq!(text.decode(&masked, false).unwrap(), "he\nhey<|im_end|>");
    // The newline that the template writes after the end of turn is not the assistant's.
    assert_eq!(tokens.response_mask.last(), Some(&false));
    let prompt = text.encode_prompt(&[Message::user("hey")]).unwrap();
    assert!(tokens.ids.starts_with(&prompt));
    assert_eq!(tokens.response_mask.iter().position(|m| *m), Some(prompt.len()));
}

#[test]
fn a_token_never_straddles_the_start_of_an_answer() {
    let text = frontend();
    // The prompt ends in a newline, and two newlines are one token.
    let tokens = text.encode_chat(&[Message::user("hey"), Message::assistant("\nhey")]).unwrap();
    assert!(tokens.ids.starts_with(&text.encode_prompt(&[Message::user("hey")]).unwrap()));
    let masked: Vec<u32> =
        tokens.ids.iter().zip(&tokens.response_mask).filter(|(_, m)| **m).map(|(id, _)| *id).collect();
    assert_eq!(text.decode(&masked, false).unwrap(), "\nhey<|im_end|>");
}

#[test]
fn every_assistant_turn_is_masked() {
    let text = frontend();
    let turns = [Message::user("a"), Message::assistant("b"), Message::user("c"), Message::assistant("d")];
    let tokens = text.encode_chat(&turns).unwrap();
    let masked: Vec<u32> =
        tokens.ids.iter().zip(&tokens.response_mask).filter(|(_, m)| **m).map(|(id, _)| *id).collect();
    assert_eq!(text.decode(&masked, false).unwrap(), "b<|im_end|>d<|im_end|>");
    let joined = text.decode(&tokens.ids, false).unwrap();
    assert!(joined.ends_with("<|im_start|>assistant\nd<|im_end|>\n"), "{joined}");
}

#[test]
fn a_template_that_rewrites_earlier_turns_is_refused() {
    let text = TextFrontend::from_gguf(&content(|m| {
        let source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}";
        m.insert("tokenizer.chat_template".to_owned(), Value::String(source.to_owned()));
    }))
    .unwrap();
    let error = text.encode_chat(&[Message::user("a"), Message::assistant("b")]).unwrap_err().to_string();
    assert!(error.contains("assistant message 2"), "{error}");
}

#[test]
fn conversations_without_an_answer_or_without_anything_are_refused() {
    let text = frontend();
    assert!(
        text.encode_chat(&[Message::user("a")]).unwrap_err().to_string().contains("no assistant message")
    );
    assert!(text.render_prompt(&[]).unwrap_err().to_string().contains("at least one message"));
}

#[test]
fn a_model_without_a_template_gets_the_plain_one() {
    let without = |edit: &dyn Fn(&mut HashMap<String, Value>)| {
        TextFrontend::from_gguf(&content(|m| {
            m.remove("tokenizer.chat_template");
            edit(m);
        }))
        .unwrap()
    };
    let text = without(&|_| ());
    assert!(!text.has_template() && frontend().has_template());
    let turns = [
        Message::new("system", "Be brief."),
        Message::user("hey"),
        Message::assistant("he"),
        Message::user("a"),
    ];
    assert_eq!(
        text.render_prompt(&turns).unwrap(),
        "System:\nBe brief.\n\nUser:\nhey\n\nAssistant:\nhe<|im_end|>\n\nUser:\na\n\nAssistant:\n"
    );
    let tokens = text.encode_chat(&turns[..3]).unwrap();
    let masked = tokens.ids.iter().zip(&tokens.response_mask).filter(|(_, m)| **m).map(|(id, _)| *id);
    assert_eq!(text.decode(&masked.collect::<Vec<_>>(), false).unwrap(), "he<|im_end|>");

    // The beginning of a text, where the tokenizer adds one: it says so, or its kind does in llama.cpp.
    let begins = |m: &mut HashMap<String, Value>| {
        m.insert("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(true));
    };
    let llama = |m: &mut HashMap<String, Value>| {
        m.insert("tokenizer.ggml.pre".to_owned(), Value::String("llama-bpe".to_owned()));
    };
    for edit in [&begins as &dyn Fn(&mut HashMap<String, Value>), &llama] {
        let prompt = without(edit).render_prompt(&[Message::user("hey")]).unwrap();
        assert_eq!(prompt, "<|im_start|>User:\nhey\n\nAssistant:\n");
    }
}

#[test]
fn special_ids_come_from_the_file() {
    let text = frontend();
    assert_eq!(text.eos_ids(), [2, 0]);
    assert_eq!((text.pad_id(), text.bos_id()), (2, Some(1)));
    let text = TextFrontend::from_gguf(&content(|m| {
        m.remove("tokenizer.ggml.padding_token_id");
        m.insert("tokenizer.ggml.eot_token_id".to_owned(), Value::U32(5));
    }))
    .unwrap();
    assert_eq!(text.eos_ids(), [2, 5, 0]);
    assert_eq!(text.pad_id(), 2);
}

#[test]
fn the_vocabulary_digest_leaves_converter_padding_out() {
    let plain = frontend();
    assert_eq!(plain.vocab_size(), 262);
    // Python: sha256 over the same tokens, each followed by a newline.
    assert_eq!(plain.vocab_digest(), "5da2b6f1dddedff4d3cc6885be2a5772c1392e5cc35cbb88be325cb87520314d");
    let padded = TextFrontend::from_gguf(&content(|m| {
        for (key, value) in [
            ("tokenizer.ggml.tokens", Value::String("[PAD262]".to_owned())),
            ("tokenizer.ggml.token_type", Value::I32(5)),
        ] {
            let Some(Value::Array(list)) = m.get_mut(key) else { panic!("{key}") };
            list.push(value);
        }
    }))
    .unwrap();
    assert_eq!((padded.vocab_digest(), padded.vocab_size()), (plain.vocab_digest(), 262));
}

#[test]
fn digits_are_split_as_the_tokenizer_says() {
    let with = |pre: &str| {
        let text = TextFrontend::from_gguf(&content(|m| {
            m.insert("tokenizer.ggml.pre".to_owned(), Value::String(pre.to_owned()));
            let Some(Value::Array(tokens)) = m.get_mut("tokenizer.ggml.tokens") else { panic!() };
            tokens.push(Value::String("12".to_owned()));
            let Some(Value::Array(types)) = m.get_mut("tokenizer.ggml.token_type") else { panic!() };
            types.push(Value::I32(1));
            let Some(Value::Array(merges)) = m.get_mut("tokenizer.ggml.merges") else { panic!() };
            merges.push(Value::String("1 2".to_owned()));
        }))
        .unwrap();
        text.encode("12").unwrap().len()
    };
    assert_eq!([with("smollm"), with("qwen2"), with("tekken")], [2, 2, 2]);
    assert_eq!([with("gpt-2"), with("llama-bpe")], [1, 1]);
}

#[test]
fn files_this_build_cannot_read_are_refused_with_a_mend() {
    let folder = "tokenizer.json";
    let set = |key: &'static str, value: Value| {
        move |m: &mut HashMap<String, Value>| drop(m.insert(key.to_owned(), value))
    };
    let s = |t: &str| Value::String(t.to_owned());
    for (error, says) in [
        (refusal(|m| drop(m.remove("tokenizer.ggml.model"))), "no tokenizer"),
        (refusal(set("tokenizer.ggml.model", s("rwkv"))), "\"rwkv\""),
        (refusal(set("tokenizer.ggml.pre", s("viking"))), "\"viking\""),
        (refusal(|m| drop(m.remove("tokenizer.ggml.merges"))), "no merges"),
        (refusal(|m| drop(m.remove("tokenizer.ggml.token_type"))), "special"),
    ] {
        assert!(error.contains(says) && error.contains(folder), "{error}");
    }
    for (error, says) in [
        (refusal(set("tokenizer.ggml.merges", Value::Array(vec![s("nospace")]))), "not a pair"),
        (refusal(set("tokenizer.ggml.merges", Value::Array(vec![s("absent tokens")]))), "inconsistent"),
        (refusal(set("tokenizer.ggml.token_type", Value::Array(vec![Value::I32(1)]))), "262 tokens but 1"),
        (refusal(set("tokenizer.ggml.eos_token_id", Value::U32(9999))), "names token 9999"),
        (refusal(set("tokenizer.ggml.bos_token_id", s("x"))), "not a token id"),
        (refusal(set("tokenizer.chat_template", s("{% if %}"))), "cannot be compiled"),
    ] {
        assert!(error.contains(says), "{error} should say {says}");
    }
}

#[test]
fn a_folder_gives_the_same_frontend() {
    let folder = tempfile::tempdir().unwrap();
    let text = frontend();
    text.tokenizer.save(folder.path().join("tokenizer.json"), false).unwrap();
    let config = serde_json::json!({
        "eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>", "pad_token": "<|im_end|>",
        "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": SMOLLM2}],
    });
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let other = TextFrontend::from_folder(folder.path()).unwrap();
    let chat = [Message::user("hey"), Message::assistant("Hi 12!")];
    assert_eq!(text.encode_chat(&chat).unwrap(), other.encode_chat(&chat).unwrap());
    assert_eq!((text.vocab_digest(), text.eos_ids()), (other.vocab_digest(), other.eos_ids()));

    // Without a template: the plain one, with the beginning of a text where tokenizer.json adds it.
    let plain = serde_json::json!({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"});
    std::fs::write(folder.path().join("tokenizer_config.json"), plain.to_string()).unwrap();
    let prompt =
        |folder: &Path| TextFrontend::from_folder(folder).unwrap().render_prompt(&chat[..1]).unwrap();
    assert_eq!(prompt(folder.path()), "User:\nhey\n\nAssistant:\n");
    let mut begins = text.tokenizer.clone();
    let template = tokenizers::processors::template::TemplateProcessing::builder()
        .try_single("<|im_start|> $A")
        .unwrap()
        .special_tokens(vec![("<|im_start|>", 1)])
        .build()
        .unwrap();
    begins.with_post_processor(Some(template));
    begins.save(folder.path().join("tokenizer.json"), false).unwrap();
    assert_eq!(prompt(folder.path()), "<|im_start|>User:\nhey\n\nAssistant:\n");

    std::fs::write(folder.path().join("chat_template.jinja"), "{{ messages[0].content }}\n").unwrap();
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [2, 7]}"#).unwrap();
    let other = TextFrontend::from_folder(folder.path()).unwrap();
    assert_eq!(other.render_prompt(&chat).unwrap(), "hey");
    assert_eq!(other.eos_ids(), [2, 7, 0]);
}

#[test]
fn a_folder_without_a_tokenizer_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let error = TextFrontend::from_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("copy the model's tokenizer.json"), "{error}");
    std::fs::write(folder.path().join("tokenizer.model"), "x").unwrap();
    assert!(TextFrontend::from_folder(folder.path()).unwrap_err().to_string().contains("save_pretrained"));
    std::fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
    assert!(TextFrontend::from_folder(folder.path()).unwrap_err().to_string().contains("not a tokenizer"));
}

#[test]
fn ids_without_a_token_are_known() {
    let text = frontend();
    let tokens = text.vocab_size() as u32;
    assert_eq!(text.absent_ids(tokens as usize), Vec::<u32>::new());
    assert_eq!(text.absent_ids(tokens as usize + 2), [tokens, tokens + 1]);
}

/// A SentencePiece vocabulary: specials, two bytes, characters, and pieces with scores.
fn pieces(m: &mut HashMap<String, Value>, space_first: bool) {
    let tokens = [
        "<unk>",
        "<|im_start|>",
        "<|im_end|>",
        "<0xC3>",
        "<0xA9>",
        "▁",
        "a",
        "b",
        "c",
        "bc",
        "ab",
        "abc",
        "▁b",
        "▁▁",
    ];
    let kind = |i: usize| match i {
        0 => 2,
        1 | 2 => 3,
        3 | 4 => 6,
        _ => 1,
    };
    let set = |m: &mut HashMap<String, Value>, key: &str, list: Vec<Value>| {
        m.insert(format!("tokenizer.ggml.{key}"), Value::Array(list));
    };
    set(m, "tokens", tokens.iter().map(|t| Value::String(t.to_string())).collect());
    set(m, "token_type", (0..tokens.len()).map(|i| Value::I32(kind(i))).collect());
    // `bc` before `ab`, whatever the order of ids; characters have no score of their own.
    let scores = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0];
    set(m, "scores", scores.iter().map(|s| Value::F32(*s)).collect());
    m.insert("tokenizer.ggml.model".into(), Value::String("llama".into()));
    m.insert("tokenizer.ggml.unknown_token_id".into(), Value::U32(0));
    m.insert("tokenizer.ggml.add_space_prefix".into(), Value::Bool(space_first));
}

#[test]
fn pieces_join_by_their_scores() {
    let text = TextFrontend::from_gguf(&content(|m| pieces(m, false))).unwrap();
    let ids = |s: &str| text.encode(s).unwrap();
    assert_eq!(ids("ab"), [10]);
    assert_eq!(ids("abc"), [11], "a and bc join to abc");
    assert_eq!(ids("abb c"), [10, 7, 5, 8]);
    assert_eq!(ids("a b"), [6, 12]);
    assert_eq!(ids("a  b"), [6, 5, 12], "a space and b join before two spaces do");
    assert_eq!(ids("é"), [3, 4], "bytes stand in for characters without a piece");
    assert_eq!(ids("ü"), [0]);
    assert_eq!(ids("<|im_start|>ab<|im_end|>"), [1, 10, 2]);
    for s in ["abc ab", "é b", " a  b "] {
        assert_eq!(text.decode(&ids(s), false).unwrap(), s);
    }
    let text = TextFrontend::from_gguf(&content(|m| pieces(m, true))).unwrap();
    assert_eq!(text.encode("b").unwrap(), [12]);
    assert_eq!(text.decode(&[12, 6], false).unwrap(), "ba");
}

#[test]
fn sentencepiece_without_scores_is_refused() {
    let error = refusal(|m| {
        pieces(m, false);
        m.remove("tokenizer.ggml.scores");
    });
    assert!(error.contains("no scores"), "{error}");
    let error = refusal(|m| {
        pieces(m, false);
        m.insert("tokenizer.ggml.scores".into(), Value::Array(vec![Value::F32(0.0)]));
    });
    assert!(error.contains("1 scores"), "{error}");
}
