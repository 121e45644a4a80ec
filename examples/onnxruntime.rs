//! Rust that serves a model by ONNX Runtime, with emaudit's operators in the graph: registers them and prints a score per token.
//!
//! ```sh
//! cargo build --release --manifest-path bindings/onnxruntime/Cargo.toml
//! python bindings/onnxruntime/insert.py probe model.onnx probed.onnx --tensor NAME --directions directions.safetensors
//! ORT_DYLIB_PATH=.../libonnxruntime.so cargo run --features onnx --example onnxruntime probed.onnx libemaudit_onnxruntime.so 1 4093 198
//! ```

use ort::session::Session;
use ort::value::Tensor;
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: onnxruntime PROBED.onnx LIBRARY TOKEN_ID...";
    let (model, library) = (arguments.next().ok_or(usage)?, arguments.next().ok_or(usage)?);
    let ids = arguments.map(|id| id.parse()).collect::<Result<Vec<i64>, _>>()?;
    let runtime = std::env::var("ORT_DYLIB_PATH").unwrap_or_else(|_| "libonnxruntime.so".into());
    let environment = ort::init_from(runtime)?.build()?;
    let builder = Session::builder(&environment)?.with_operator_library(library)?;
    let mut session = { builder }.commit_from_file(model)?;
    let ids = Tensor::from_array(([1, ids.len() as i64], ids))?;
    let outputs = session.run(ort::inputs!["input_ids" => ids])?;
    let (_, scores) = outputs["emaudit.scores"].try_extract_tensor::<f32>()?;
    scores.iter().for_each(|score| println!("{score}"));
    Ok(())
}
