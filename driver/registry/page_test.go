package registry

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
)

// TestPage: pages of any size give together what List gives, whatever lies beside the
// prefix.
func TestPage(t *testing.T) {
	s, err := Open(filepath.Join(t.TempDir(), "registry"))
	if err != nil {
		t.Fatal(err)
	}
	var writes []Write
	for i := range 23 {
		writes = append(writes, Write{Key: fmt.Sprintf("a/b/%02d", i), Value: []byte{byte(i)}})
	}
	for _, key := range []string{"a", "a/a", "a/b", "a/b0", "a/c/1"} {
		writes = append(writes, Write{Key: key, Value: []byte("beside")})
	}
	if _, err := s.Commit(t.Context(), nil, writes); err != nil {
		t.Fatal(err)
	}
	want, err := s.List(t.Context(), "a/b/")
	if err != nil || len(want) != 23 {
		t.Fatalf("%d keys: %v", len(want), err)
	}
	for _, limit := range []int{1, 2, 7, 22, 23, 24, 1000} {
		var got []KV
		after, more := "", true
		for pages := 0; more; pages++ {
			var kvs []KV
			if kvs, more, err = s.Page(t.Context(), "a/b/", after, limit); err != nil || len(kvs) > limit || pages > 23 || more && len(kvs) < limit {
				t.Fatalf("limit %d: page %d of %d keys, more %v: %v", limit, pages, len(kvs), more, err)
			}
			got = append(got, kvs...)
			if len(kvs) > 0 {
				after = kvs[len(kvs)-1].Key
			}
		}
		if !slices.EqualFunc(got, want, func(a, b KV) bool {
			return a.Key == b.Key && a.Revision == b.Revision && string(a.Value) == string(b.Value)
		}) {
			t.Errorf("limit %d: %d keys, want %d", limit, len(got), len(want))
		}
	}
	// A key that is gone is a place to go on from all the same.
	if kvs, more, err := s.Page(t.Context(), "a/b/", "a/b/05x", 2); err != nil || !more || kvs[0].Key != "a/b/06" || kvs[1].Key != "a/b/07" {
		t.Errorf("behind a/b/05x: %v, more %v, %v", kvs, more, err)
	}
	if _, _, err := s.Page(t.Context(), "a/", "", 0); err == nil {
		t.Error("a page of no keys")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Page(t.Context(), "a/", "", 1); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}
