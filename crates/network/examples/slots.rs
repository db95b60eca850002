//! What a network slot costs: made and destroyed, or cleaned and used again (root).
//!
//!     cargo run --release -p nidus-network --example slots

use std::time::{Duration, Instant};

use nidus_network::{EgressRules, NetworkConfig, NetworkError, Pool, reclaim};

const ROUNDS: u32 = 100;

fn config(max_slots: u32) -> NetworkConfig {
    NetworkConfig { first_index: 31_700, max_slots, table: "nidus_bench".into(), ..NetworkConfig::default() }
}

/// Makes slots, one after the other, and destroys them.
async fn made() -> Result<(Duration, Duration), NetworkError> {
    let began = Instant::now();
    let pool = Pool::start(config(ROUNDS), 1).await?;
    let mut slots = Vec::new();
    for _ in 0..ROUNDS {
        slots.push(pool.acquire().await?);
    }
    let made = began.elapsed();
    let began = Instant::now();
    // The first ones find room.
    for slot in slots {
        pool.release(slot).await;
    }
    let destroyed = began.elapsed();
    pool.shutdown().await;
    Ok((made / ROUNDS, destroyed / ROUNDS))
}

/// One slot, from tenant to tenant.
async fn reused() -> Result<(Duration, Duration), NetworkError> {
    let pool = Pool::start(config(1), 1).await?;
    let rules = EgressRules { denied: vec![Default::default()], ..EgressRules::default() };
    let (mut set, mut cleaned) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..ROUNDS {
        let slot = pool.acquire().await?;
        let began = Instant::now();
        slot.set_egress(&rules).await?;
        set += began.elapsed();
        let began = Instant::now();
        pool.release(slot).await;
        cleaned += began.elapsed();
    }
    pool.shutdown().await;
    Ok((set / ROUNDS, cleaned / ROUNDS))
}

#[tokio::main]
async fn main() -> Result<(), NetworkError> {
    reclaim(&config(ROUNDS))?;
    let (made, destroyed) = made().await?;
    let (set, cleaned) = reused().await?;
    let whole = made + destroyed;
    println!(
        "made        {made:>10.2?}\ndestroyed   {destroyed:>10.2?}\ncleaned     {cleaned:>10.2?}  (of made and destroyed: {:.2})",
        cleaned.as_secs_f64() / whole.as_secs_f64()
    );
    println!("a policy is set in {set:.2?}");
    Ok(())
}
