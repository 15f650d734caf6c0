// Package registry holds what all daemons must agree on: pools, volumes,
// snapshots, nodes, owners and epochs. Store is its seam: a small ordered
// key-value store with compare-and-swap transactions and watches. The embedded
// one (Open) is for a single host; every commit is synced to disk before it
// returns.
package registry

import (
	"context"
	"errors"
)

// ErrConflict: a compare of the transaction did not hold; nothing was changed.
var ErrConflict = errors.New("registry: compare failed")

// KV is a key with its value and the revision of its last change.
type KV struct {
	Key      string
	Value    []byte
	Revision int64 // grows with every commit; never reused, also across restarts
}

// Compare is a condition of a transaction: the key's revision is Revision
// (0: the key does not exist).
type Compare struct {
	Key      string
	Revision int64
}

// Write is a change of a transaction: a put, or a delete if Value is nil.
type Write struct {
	Key   string
	Value []byte
}

// Event is a change that a watch saw. KV.Value is nil for a delete.
type Event struct{ KV }

// Store is a compare-and-swap store with watches. Safe from any goroutine.
type Store interface {
	// Get returns a key; ok is false if it does not exist.
	Get(ctx context.Context, key string) (kv KV, ok bool, err error)
	// List returns all keys with the prefix in order.
	List(ctx context.Context, prefix string) ([]KV, error)
	// Commit applies all writes if all compares hold, else it fails with
	// ErrConflict. The result is durable. It returns the commit's revision.
	Commit(ctx context.Context, compares []Compare, writes []Write) (revision int64, err error)
	// Watch sends every change under prefix after revision from (0: from now on)
	// until ctx ends, then the channel closes. A watcher that is too slow or asks
	// for a revision that is gone gets its channel closed; it lists and watches anew.
	Watch(ctx context.Context, prefix string, from int64) (<-chan Event, error)
	Close() error
}
