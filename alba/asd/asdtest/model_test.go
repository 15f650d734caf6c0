package asdtest

import (
	"context"
	"errors"
	"strings"
	"testing"

	"scoria/alba/asd"
)

// checked gives the Model the limits that it leaves out.
type checked struct{ *Model }

func badKey(key string) bool { return key == "" || len(key) > asd.MaxKeyBytes }

func (c checked) Get(ctx context.Context, key string, pri asd.Priority) (asd.Value, error) {
	if badKey(key) {
		return asd.Value{}, asd.ErrInvalid
	}
	return c.Model.Get(ctx, key, pri)
}

func (c checked) MultiGet(ctx context.Context, keys []string, pri asd.Priority) ([]asd.Result, error) {
	for _, k := range keys {
		if badKey(k) {
			return nil, asd.ErrInvalid
		}
	}
	return c.Model.MultiGet(ctx, keys, pri)
}

func (c checked) Exists(ctx context.Context, keys []string, pri asd.Priority) ([]asd.Info, error) {
	if len(keys) > asd.MaxKeys {
		return nil, asd.ErrInvalid
	}
	return c.Model.Exists(ctx, keys, pri)
}

func (c checked) ReadAt(ctx context.Context, key string, p []byte, off int64, pri asd.Priority) (asd.ReadInfo, error) {
	if off < 0 {
		return asd.ReadInfo{}, asd.ErrInvalid
	}
	return c.Model.ReadAt(ctx, key, p, off, pri)
}

func (c checked) Apply(ctx context.Context, asserts []asd.Assert, updates []asd.Update, pri asd.Priority) error {
	total := 0
	for _, a := range asserts {
		if badKey(a.Key) || a.Kind == 0 || len(a.Data) > asd.MaxAssertBytes {
			return asd.ErrInvalid
		}
	}
	for _, u := range updates {
		if total += len(u.Value.Data); badKey(u.Key) || u.Kind == 0 || total > asd.MaxValueBytes {
			return asd.ErrInvalid
		}
	}
	return c.Model.Apply(ctx, asserts, updates, pri)
}

func TestModelConforms(t *testing.T) {
	Run(t, func(*testing.T) asd.Client { return checked{NewModel("model")} })
}

func TestModelCorrupt(t *testing.T) {
	m := NewModel("model")
	put(t, m, "k", []byte(strings.Repeat("x", 10_000)))
	if !m.Corrupt("k", 5000) || m.Corrupt("k", 10_000) || m.Corrupt("none", 0) {
		t.Fatal("corrupted what isn't there, or not what is")
	}
	_, err := m.Get(background, "k", guest)
	wantErr(t, err, asd.ErrCorrupt)
	_, err = m.ReadAt(background, "k", make([]byte, 4096), 0, guest)
	must(t, err)
	_, err = m.ReadAt(background, "k", make([]byte, 1), 5000, guest)
	wantErr(t, err, asd.ErrCorrupt)
	res, err := asd.VerifyAll(background, m, asd.VerifyOptions{})
	if err != nil || len(res.Bad) != 1 || res.Bad[0].Off != 4096 {
		t.Fatalf("%+v, %v", res, err)
	}
}

func TestFaulty(t *testing.T) {
	f := NewFaulty(NewModel("model"))
	put(t, f, "k", nil)
	f.Set(Fault{Down: true})
	_, err := f.Get(background, "k", guest)
	wantErr(t, err, asd.ErrUnavailable)
	f.Set(Fault{Full: true})
	wantErr(t, f.Apply(background, nil, []asd.Update{asd.Put("l", asd.NewValue(nil))}, guest), asd.ErrFull)
	must(t, f.Apply(background, nil, []asd.Update{asd.Delete("k")}, guest))
	f.Set(Fault{LoseAnswers: true})
	wantErr(t, f.Apply(background, nil, []asd.Update{asd.Put("l", asd.NewValue(nil))}, guest), asd.ErrUnknownOutcome)
	f.Set(Fault{Stopped: true})
	done := make(chan error)
	go func() {
		_, err := f.Get(background, "l", guest)
		done <- err
	}()
	ctx, cancel := context.WithCancel(background)
	cancel()
	_, err = f.Get(ctx, "l", guest)
	wantErr(t, err, context.Canceled)
	f.Set(Fault{})
	must(t, <-done)
	wrong := errors.New("wrong")
	f.Set(Fault{Hook: func(op, key string) error { return wrong }})
	_, err = f.Stats(background)
	wantErr(t, err, wrong)
}
