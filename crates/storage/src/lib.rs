//! Artifacts of a build by build id: layout, staging, atomic publication
