package alba

import (
	"context"
	"errors"
)

// ErrConflict: a compare of a registry transaction did not hold; nothing was changed.
var ErrConflict = errors.New("registry: compare failed")

// KV is a key of the registry with its value and the revision of its last change.
type KV struct {
	Key      string
	Value    []byte
	Revision int64
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

// MaxCommitWrites is how many writes, and how many compares, one transaction of
// this package's users has at most.
const MaxCommitWrites = 500

// Registry is what the store asks of the compare-and-swap registry that all hosts
// agree on. Safe from any goroutine.
type Registry interface {
	// Get returns a key; ok is false if it does not exist.
	Get(ctx context.Context, key string) (kv KV, ok bool, err error)
	// List returns all keys with the prefix in order.
	List(ctx context.Context, prefix string) ([]KV, error)
	// Commit applies all writes if all compares hold, else it fails with
	// ErrConflict. The result is durable. It returns the commit's revision.
	Commit(ctx context.Context, compares []Compare, writes []Write) (revision int64, err error)
	// Watch sends every change under prefix after revision from (0: from now on)
	// until ctx ends, then the channel closes. A watcher that is too slow gets its
	// channel closed too; it starts anew.
	Watch(ctx context.Context, prefix string, from int64) (<-chan Event, error)
}

// Pager is implemented by registries that can list a prefix in parts, so that
// whoever goes through a million objects holds a few hundred of them.
type Pager interface {
	// Page returns up to limit keys with the prefix that come behind after ("" for the
	// first), in order, and whether there are more.
	Page(ctx context.Context, prefix, after string, limit int) (kvs []KV, more bool, err error)
}

// pageKeys is how many keys Each asks for at a time.
const pageKeys = 500

// Each calls fn with every key that has the prefix, in order, until fn fails. With a
// Pager the keys are those of no single moment: one that comes or goes meanwhile may
// be among them or not.
func Each(ctx context.Context, r Registry, prefix string, fn func(KV) error) error {
	pager, ok := r.(Pager)
	if !ok {
		kvs, err := r.List(ctx, prefix)
		if err != nil {
			return err
		}
		return eachOf(kvs, fn)
	}
	after := ""
	for {
		kvs, more, err := pager.Page(ctx, prefix, after, pageKeys)
		if err != nil {
			return err
		}
		if err := eachOf(kvs, fn); err != nil || !more || len(kvs) == 0 {
			return err
		}
		after = kvs[len(kvs)-1].Key
	}
}

func eachOf(kvs []KV, fn func(KV) error) error {
	for _, kv := range kvs {
		if err := fn(kv); err != nil {
			return err
		}
	}
	return nil
}
