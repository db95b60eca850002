//! The client's side of SOCKS5 (RFC 1928) with a user name and password (RFC 1929).

use std::io;
use std::net::SocketAddrV4;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::SocksProxy;

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const USER_PASSWORD: u8 = 2;

fn refused(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionRefused, what.into())
}

/// Asks the proxy at the other end for a connection; afterwards the stream is that connection.
///
/// # Errors
/// When it refuses, or does not speak SOCKS5.
pub async fn connect<S>(stream: &mut S, proxy: &SocksProxy, to: SocketAddrV4) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let method = if proxy.username.is_empty() { NO_AUTHENTICATION } else { USER_PASSWORD };
    stream.write_all(&[VERSION, 1, method]).await?;
    let mut chosen = [0; 2];
    stream.read_exact(&mut chosen).await?;
    if chosen[0] != VERSION {
        return Err(refused("the egress proxy does not speak SOCKS5"));
    }
    if chosen[1] != method {
        return Err(refused("the egress proxy wants another authentication"));
    }
    if method == USER_PASSWORD {
        let mut request = vec![1];
        for part in [&proxy.username, &proxy.password] {
            // Policies have no longer ones.
            request.push(u8::try_from(part.len()).map_err(|_| refused("a credential of over 255 bytes"))?);
            request.extend(part.as_bytes());
        }
        stream.write_all(&request).await?;
        let mut status = [0; 2];
        stream.read_exact(&mut status).await?;
        if status[1] != 0 {
            return Err(refused("the egress proxy does not take the user name and password"));
        }
    }
    let mut request = vec![VERSION, 1, 0, 1];
    request.extend(to.ip().octets());
    request.extend(to.port().to_be_bytes());
    stream.write_all(&request).await?;
    let mut reply = [0; 4];
    stream.read_exact(&mut reply).await?;
    if reply[1] != 0 {
        return Err(refused(format!("the egress proxy answers {} for {to}", meaning(reply[1]))));
    }
    // The address that it bound: nobody needs it, but it stands before the data.
    let length = match reply[3] {
        1 => 4,
        4 => 16,
        3 => usize::from(stream.read_u8().await?),
        other => return Err(refused(format!("the egress proxy names an address of type {other}"))),
    };
    stream.read_exact(&mut vec![0; length + 2]).await?;
    Ok(())
}

/// RFC 1928, 6.
fn meaning(code: u8) -> String {
    let known = match code {
        1 => "general failure",
        2 => "not allowed",
        3 => "network unreachable",
        4 => "host unreachable",
        5 => "connection refused",
        6 => "TTL expired",
        7 => "command not supported",
        8 => "address type not supported",
        other => return format!("code {other}"),
    };
    known.to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::duplex;

    use super::*;

    fn proxy(user: &str) -> SocksProxy {
        SocksProxy { address: "p:1".into(), username: user.into(), password: "pw".into(), tls: None }
    }

    async fn against(user: &str, answers: Vec<u8>) -> (io::Result<()>, Vec<u8>, Vec<u8>) {
        let (mut ours, mut theirs) = duplex(4096);
        theirs.write_all(&answers).await.unwrap();
        let done = connect(&mut ours, &proxy(user), "203.0.113.9:443".parse().unwrap()).await;
        let mut sent = vec![0; 4096];
        let n = theirs.read(&mut sent).await.unwrap();
        sent.truncate(n);
        let mut rest = Vec::new();
        drop(theirs);
        let _ = ours.read_to_end(&mut rest).await;
        (done, sent, rest)
    }

    #[tokio::test]
    async fn the_words_are_those_of_the_rfc() {
        let answers = [&[5, 2, 1, 0][..], &[5, 0, 0, 3, 2, b'h', b'i', 0, 9], b"data"].concat();
        let (done, sent, rest) = against("me", answers).await;
        done.unwrap();
        assert_eq!(
            sent,
            [&[5, 1, 2, 1, 2][..], b"me", &[2], b"pw", &[5, 1, 0, 1, 203, 0, 113, 9, 1, 187]].concat()
        );
        assert_eq!(rest, b"data");
    }

    #[tokio::test]
    async fn every_refusal_is_one() {
        for answers in [vec![5, 255], vec![4, 0], vec![5, 0, 5, 5, 0, 1], vec![5, 0, 5, 0, 0, 9], vec![5, 2]]
        {
            assert!(against("", answers.clone()).await.0.is_err(), "{answers:?}");
        }
        assert!(against("me", vec![5, 2, 1, 1]).await.0.is_err());
    }

    proptest! {
        #[test]
        fn whatever_a_proxy_says(mut answers in prop::collection::vec(any::<u8>(), 0..300)) {
            answers.splice(0..0, [5, 0]);
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let _ = runtime.block_on(async {
                let (mut ours, mut theirs) = duplex(4096);
                theirs.write_all(&answers).await.unwrap();
                // The end of what it says.
                theirs.shutdown().await.unwrap();
                connect(&mut ours, &proxy(""), "203.0.113.9:443".parse().unwrap()).await
            });
        }
    }
}
