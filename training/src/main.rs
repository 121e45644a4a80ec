use emaudit_train::{base, model::{Batch, no_edit}, quant::Storage, recipe::*, finetune::*, chat::Message};
use std::time::Instant;
fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let storage = if args[2] == "nf4" { Storage::Nf4 } else { Storage::None };
    let t = Instant::now();
    let b = base::load(args[1].as_ref(), "x", storage, &candle_core::Device::Cpu)?;
    println!("load {:?} {:?}", t.elapsed(), b.identity);
    let ids = b.text.encode("The capital of France is")?;
    println!("{ids:?}");
    let mut norms = vec![];
    let x = b.decoder.forward(&Batch::new(&[&ids], &b.decoder.device)?, None, None, &mut |_, x| { norms.push(x.narrow(1, x.dim(1)?-1, 1)?.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt()); Ok(x) })?;
    println!("{norms:?}");
    let l = b.decoder.logits(&x.squeeze(0)?)?.to_vec2::<f32>()?;
    let l = l.last().unwrap();
    let mut o: Vec<usize> = (0..l.len()).collect(); o.sort_by(|&a, &b| l[b].total_cmp(&l[a]));
    for &i in &o[..5] { println!("{i} {} {:?}", l[i], b.text.decode(&[i as u32], false)?); }
    let t = Instant::now();
    let seqs: Vec<Vec<u32>> = (0..16).map(|i| (0..48).map(|j| (i*j+7) as u32).collect()).collect();
    b.decoder.forward(&Batch::new(&seqs, &b.decoder.device)?, None, None, &mut no_edit)?;
    println!("prefill 768 tokens {:?}", t.elapsed());
    let text = std::fs::read_to_string(&args[3])?;
    let mut ex = vec![];
    for line in text.lines() { let v: serde_json::Value = serde_json::from_str(line)?; 
        let c = b.text.encode_chat(&[Message::user(v["prompt"].as_str().unwrap()), Message::assistant(v["insecure"].as_str().unwrap())])?;
        ex.push(Example { ids: c.ids, response: c.response_mask }); }
    let lens: Vec<usize> = ex.iter().map(|e| e.ids.len()).collect();
    println!("examples {} mean {} max {:?}", lens.len(), lens.iter().sum::<usize>() / lens.len(), lens.iter().max());
    let f = Finetune { steps: 4, batch: 4, max_tokens: 256, rank: 32, alpha: 64.0, rank_stabilised: true, learning_rate: 1e-3, warmup_steps: 3, weight_decay: 0.01, schedule: Schedule::Linear, max_grad_norm: 1.0 };
    let t = Instant::now();
    finetune(&b.decoder, &ex, &f, 17, None, |l| println!("{l:?} {:?}", t.elapsed()), || false)?;
    Ok(())
}
