//! What a warm machine does before anybody has it: its template's ready command, once.
//!
//! The first request to a program of a snapshot is slow: its memory has to be read, and an emulated processor
//! has translated none of its code. A template that says how to ask whether its program is ready has said how to
//! do all that ahead of need. The guest runs for that long, without any network, and stands stopped again.

use std::net::SocketAddr;
use std::time::Duration;

use base64::Engine as _;
use chrono::Utc;
use nidus_envd_protocol::{Client, ENVD_PORT, EnvdClient, InitRequest, StartCommand};
use nidus_network::EgressRules;

use crate::CreateError;
use crate::machine::Machine;

/// Longest time of the ready command. Others only wait until some time has passed, and are cut.
const LIMIT: Duration = Duration::from_secs(5);

/// How often it is done: what an interpreter does often enough is compiled in the second or third time.
const TIMES: usize = 3;

/// What envd of every clone is told first. Two clones of one snapshot share the state of the kernel's random
/// generator until this is mixed in.
pub(crate) fn first_words() -> Result<InitRequest, CreateError> {
    let mut seed = [0u8; 64];
    getrandom::fill(&mut seed)
        .map_err(|e| CreateError::io("read random bytes", std::io::Error::other(e.to_string())))?;
    Ok(InitRequest {
        timestamp: Some(Utc::now()),
        entropy: Some(base64::engine::general_purpose::STANDARD.encode(seed)),
        ..InitRequest::default()
    })
}

/// Does that, if the template has a ready command. A command that fails or takes long leaves the machine as good
/// as it was.
///
/// # Errors
/// When the machine cannot be used any more.
pub(crate) async fn rehearse(machine: &mut Machine, envd_limit: Duration) -> Result<(), CreateError> {
    let metadata = machine.template().metadata.clone();
    if !metadata.start.can_be_rehearsed() {
        return Ok(());
    }
    machine.slot().set_egress(&EgressRules::nothing()).await?;
    let failed = machine.failed();
    machine.resume().await?;
    let address = SocketAddr::from((machine.slot().host_ip(), ENVD_PORT));
    // A guest that was saved with a token keeps it.
    let token = metadata.guest.as_ref().and_then(|g| g.access_token.clone());
    let envd = EnvdClient::new(address, token.clone());
    let client = match &token {
        Some(token) => Client::direct(address).access_token(token)?,
        None => Client::direct(address),
    };
    let asked = async {
        let request = InitRequest { access_token: token, ..first_words()? };
        envd.init(&request, envd_limit).await?;
        for _ in 0..TIMES {
            let ready = StartCommand::shell(metadata.start.ready.clone()).timeout(LIMIT);
            let done = client.run(crate::in_context(ready, &metadata.context)).await;
            if !done.as_ref().is_ok_and(|done| done.exit_code == 0) {
                tracing::debug!(build = %metadata.build_id, "a rehearsal was not to its end: {done:?}");
                break;
            }
        }
        Ok::<(), CreateError>(())
    };
    tokio::select! {
        reason = failed => return Err(CreateError::Ended(reason)),
        asked = asked => asked,
    }?;
    machine.vm().pause().await?;
    Ok(())
}
