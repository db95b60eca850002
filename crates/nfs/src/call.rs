//! Remote procedure calls (RFC 5531): what a record asks for, and the fronts of answers.

use crate::credentials::{Credentials, MAX_GROUPS};
use crate::xdr::{Garbage, Reader, Result, Writer};

const RPC_VERSION: u32 = 2;
const CALL: u32 = 0;
const REPLY: u32 = 1;
/// Bytes of who calls, and of a machine's name in it.
const MAX_AUTH: usize = 400;
const MAX_MACHINE: usize = 255;
pub(crate) const AUTH_SYS: u32 = 1;

/// What a record asks for.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub xid: u32,
    pub program: u32,
    pub version: u32,
    pub procedure: u32,
    pub credentials: Credentials,
    pub arguments: Reader<'a>,
}

/// What cannot be answered as a call.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NoCall {
    /// Not even whom to answer: the connection ends.
    Garbage,
    /// Another version of the protocol of calls.
    Version { xid: u32 },
}

impl From<Garbage> for NoCall {
    fn from(_: Garbage) -> Self {
        Self::Garbage
    }
}

impl<'a> Call<'a> {
    /// # Errors
    /// When it is no call.
    pub fn parse(record: &'a [u8]) -> std::result::Result<Self, NoCall> {
        let mut r = Reader::new(record);
        let xid = r.u32()?;
        if r.u32()? != CALL {
            return Err(NoCall::Garbage);
        }
        if r.u32()? != RPC_VERSION {
            return Err(NoCall::Version { xid });
        }
        let (program, version, procedure) = (r.u32()?, r.u32()?, r.u32()?);
        let (flavour, body) = (r.u32()?, r.opaque(MAX_AUTH)?);
        let credentials = if flavour == AUTH_SYS { system(body)? } else { Credentials::default() };
        let (_, _) = (r.u32()?, r.opaque(MAX_AUTH)?);
        Ok(Self { xid, program, version, procedure, credentials, arguments: r })
    }
}

/// `authsys_parms` (RFC 5531, appendix A).
fn system(body: &[u8]) -> Result<Credentials> {
    let mut r = Reader::new(body);
    let _stamp = r.u32()?;
    let _machine = r.opaque(MAX_MACHINE)?;
    let (uid, gid, count) = (r.u32()?, r.u32()?, r.u32()? as usize);
    if count > MAX_GROUPS {
        return Err(Garbage);
    }
    let groups = (0..count).map(|_| r.u32()).collect::<Result<_>>()?;
    Ok(Credentials { uid, gid, groups })
}

/// Why a call was not done, though it was understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    NoProgram,
    /// The one version that there is.
    Version(u32),
    NoProcedure,
    Garbage,
}

/// The front of an answer whose call was done; its results follow.
pub(crate) fn accepted(xid: u32) -> Writer {
    front(xid, 0)
}

fn front(xid: u32, status: u32) -> Writer {
    let mut w = Writer::default();
    // Accepted, by nobody in particular.
    w.u32(xid).u32(REPLY).u32(0).u32(0).u32(0).u32(status);
    w
}

/// A whole answer that says why not.
pub(crate) fn refused(xid: u32, why: Refusal) -> Writer {
    match why {
        Refusal::NoProgram => front(xid, 1),
        Refusal::Version(v) => {
            let mut w = front(xid, 2);
            w.u32(v).u32(v);
            w
        }
        Refusal::NoProcedure => front(xid, 3),
        Refusal::Garbage => front(xid, 4),
    }
}

/// The answer to another version of the protocol of calls.
pub(crate) fn wrong_version(xid: u32) -> Writer {
    let mut w = Writer::default();
    w.u32(xid).u32(REPLY).u32(1).u32(0).u32(RPC_VERSION).u32(RPC_VERSION);
    w
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(flavour: u32, body: &[u8]) -> Vec<u8> {
        let mut w = Writer::default();
        w.u32(9)
            .u32(CALL)
            .u32(2)
            .u32(100_003)
            .u32(3)
            .u32(1)
            .u32(flavour)
            .opaque(body)
            .u32(0)
            .opaque(&[])
            .u32(77);
        w.into_bytes()
    }

    #[test]
    fn callers_are_who_they_say() {
        let mut body = Writer::default();
        body.u32(0).opaque(b"guest").u32(1000).u32(1001).u32(2).u32(5).u32(6);
        let bytes = record(1, &body.into_bytes());
        let mut call = Call::parse(&bytes).unwrap();
        assert_eq!(call.credentials, Credentials { uid: 1000, gid: 1001, groups: vec![5, 6] });
        assert_eq!((call.xid, call.program, call.version, call.procedure), (9, 100_003, 3, 1));
        assert_eq!(call.arguments.u32(), Ok(77));
        let anonymous = record(0, &[]);
        assert_eq!(Call::parse(&anonymous).unwrap().credentials, Credentials::default());
    }

    #[test]
    fn what_is_no_call_is_said_so() {
        let mut many = Writer::default();
        many.u32(0).opaque(b"x").u32(0).u32(0).u32(17);
        for bad in [
            vec![],
            vec![0; 8],
            record(1, &[1, 2, 3, 4]),
            record(1, &many.into_bytes()),
            record(0, &[0; 404]),
        ] {
            assert_eq!(Call::parse(&bad).unwrap_err(), NoCall::Garbage);
        }
        let mut other = record(0, &[]);
        other[11] = 3;
        assert_eq!(Call::parse(&other).unwrap_err(), NoCall::Version { xid: 9 });
    }
}
