package lba

import "testing"

func newMap(t testing.TB, clusters uint64) *Map {
	t.Helper()
	m, err := New(clusters)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}
