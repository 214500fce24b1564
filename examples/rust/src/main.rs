//! A host in Rust. host ADAPTER
mod lora_engine;
use lora_engine::{matrix, Pool, Step, APPLIED};

const IN: usize = 96;
const OUT: usize = 80;
const ROWS: usize = 4;
const STEPS: usize = 25;

/// Multiples of 1/16 from -1 to 1 (an LCG: Numerical Recipes).
struct Stream(u32);

impl Stream {
    fn draw(&mut self, to: &mut [f32]) {
        for value in to {
            self.0 = self.0.wrapping_mul(1664525).wrapping_add(1013904223);
            *value = (((self.0 >> 8) % 33) as i32 - 16) as f32 / 16.0;
        }
    }
}

/// FNV-1a.
fn add_to_digest(digest: &mut u32, bytes: &[u8]) {
    for byte in bytes {
        *digest = (*digest ^ u32::from(*byte)).wrapping_mul(16777619);
    }
}

fn main() -> Result<(), String> {
    let path = std::env::args().nth(1).ok_or("expected an adapter's file")?;
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let mut pool = Pool::new(IN, OUT)?;
    let slot = pool.import(&bytes, 2.0)?;
    let (mut stream, mut digest) = (Stream(1), 2166136261u32);
    let (mut x, mut y) = (vec![0f32; ROWS * IN], vec![0f32; ROWS * OUT]);
    let mut target = vec![0f32; ROWS * OUT];
    let step = Step {
        lr: 0.001, lr_ratio: 1.0, max_norm: 1.0, weight_decay: 0.0, train_a: 1,
        ewc: std::ptr::null_mut(),
    };
    for _ in 0..STEPS {
        stream.draw(&mut x);
        stream.draw(&mut target);
        pool.forward(slot, &matrix(&mut x, IN), &mut matrix(&mut y, OUT))?;
        for (value, wanted) in y.iter_mut().zip(&target) {
            add_to_digest(&mut digest, &value.to_le_bytes());
            *value -= wanted;
        }
        let (outcome, _) = pool.adapt(slot, &matrix(&mut x, IN), &matrix(&mut y, OUT), &step)?;
        if outcome != APPLIED {
            return Err("nothing was learned".into());
        }
    }
    add_to_digest(&mut digest, &pool.export(slot, "served")?);
    println!("digest {digest:08x}");
    Ok(())
}
