use crate::results::Results;
use anyhow::Result;
pub fn render(_r: &Results, _run: Option<&serde_json::Value>) -> Result<String> { Ok("<html></html>".into()) }
pub fn readme_picture(_r: &Results) -> Result<String> { Ok("<svg/>".into()) }
pub fn terminal(r: &Results) -> String { serde_json::to_string_pretty(&r.summary).unwrap() + "\n" }
