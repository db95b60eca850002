//! A sandbox and its life cycle: the factory, the warm pool, create, kill
