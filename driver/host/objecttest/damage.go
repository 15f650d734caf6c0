package objecttest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/repair"
	"scoria/alba/vfs"
)

// ValueFiles lists the files below a store's directory that storage daemons keep values
// in: of fragments that are too large for their key-value stores.
func ValueFiles(fsys vfs.FS, dir string) ([]string, error) {
	asds, err := fsys.List(dir)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, a := range asds {
		values := path.Join(dir, a, "values")
		groups, err := fsys.List(values)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, g := range groups {
			names, err := fsys.List(path.Join(values, g))
			if err != nil {
				return nil, err
			}
			for _, n := range names {
				out = append(out, path.Join(values, g, n))
			}
		}
	}
	return out, nil
}

// DataOff is where the value begins in one of ValueFiles; 0 if it is an adopted file,
// which has no head.
func DataOff(fsys vfs.FS, file string) (int64, error) {
	f, err := fsys.Open(file, vfs.ReadOnly)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	head := make([]byte, 44)
	if _, err := f.ReadAt(head, 0); err != nil {
		return 0, err
	}
	if string(head[:8]) != "scoVALUE" {
		return 0, nil
	}
	return int64(binary.LittleEndian.Uint32(head[40:])), nil
}

func (s *Store) manifest(ctx context.Context, ns, name string) (*alba.Manifest, error) {
	kv, ok, err := s.Proxy.Registry().Get(ctx, alba.NamespaceKey(ns))
	if err != nil || !ok {
		return nil, fmt.Errorf("namespace %s: found %v, %w", ns, ok, err)
	}
	n, err := alba.Decode[alba.Namespace](kv.Value)
	if err != nil {
		return nil, err
	}
	if kv, ok, err = s.Proxy.Registry().Get(ctx, alba.ObjectKey(n.ID, name)); err != nil || !ok {
		return nil, fmt.Errorf("object %s/%s: found %v, %w", ns, name, ok, err)
	}
	return alba.DecodeManifest(kv.Value)
}

// Spoil flips a bit of the byte at an object's offset as the storage daemon of its data
// fragment has it, with a checksum that fits: what a bad memory does before anybody has
// computed one. Only who stored the object can tell. Again, it undoes that. For presets
// that neither compress nor encrypt.
func (s *Store) Spoil(ctx context.Context, ns, name string, off int64) error {
	m, err := s.manifest(ctx, ns, name)
	if err != nil {
		return err
	}
	err = fmt.Errorf("%s/%s has no byte at %d", ns, name, off)
	m.Layout().Pieces(off, 1, func(pc alba.Piece) bool {
		member := s.Proxy.Fleet().Member(m.Shards[pc.Shard])
		if member == nil {
			err = fmt.Errorf("shard %d of %s/%s has no storage daemon", pc.Shard, ns, name)
			return false
		}
		var c asd.Client
		if c, err = member.Client(ctx); err != nil {
			return false
		}
		key := alba.FragmentKey(m.NamespaceID, m.Upload, pc.Shard, pc.Chunk)
		v, e := c.Get(ctx, key, asd.PriorityRepair)
		if err = e; err != nil {
			return false
		}
		data := slices.Clone(v.Data)
		data[pc.Off] ^= 0x10
		err = c.Apply(ctx, nil, []asd.Update{asd.Put(key, asd.NewValue(data))}, asd.PriorityRepair)
		return false
	})
	return err
}

// Lose takes all fragments of an object from the storage daemons: it is lost for good.
func (s *Store) Lose(ctx context.Context, ns, name string) error {
	m, err := s.manifest(ctx, ns, name)
	if err != nil {
		return err
	}
	for shard, id := range m.Shards {
		if id == "" {
			continue
		}
		c, err := s.Proxy.Fleet().Member(id).Client(ctx)
		if err != nil {
			return err
		}
		for chunk := range m.Layout().Chunks() {
			key := alba.FragmentKey(m.NamespaceID, m.Upload, shard, chunk)
			if err := c.Apply(ctx, nil, []asd.Update{asd.Delete(key)}, asd.PriorityRepair); err != nil {
				return err
			}
		}
	}
	return nil
}

// Verify reads everything that the storage daemons have and returns how many problems
// it found. As far as that is possible they are repaired when it returns, and what reads
// met before.
func (s *Store) Verify(ctx context.Context) (problems int64, err error) {
	keeper := repair.New(repair.Options{Proxy: s.Proxy, Faults: s.faults, Log: zerolog.Nop()})
	running, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	err = keeper.Start(ctx, repair.JobVerify)
	go func() { defer close(done); keeper.Run(running) }()
	if err == nil {
		problems, err = verified(ctx, keeper)
	}
	stop()
	<-done
	for err == nil {
		var report repair.Report
		if report, err = keeper.Pass(ctx); report.Left > 0 || report.Mended == 0 && s.faults.Empty() {
			break
		}
	}
	return problems, err
}

// verified waits until the verification is done.
func verified(ctx context.Context, keeper *repair.Maintainer) (problems int64, err error) {
	for {
		jobs, err := keeper.Jobs(ctx)
		if err != nil {
			return 0, err
		}
		for _, j := range jobs {
			switch {
			case j.Name != repair.JobVerify:
			case j.State == repair.JobDone:
				return j.Problems, nil
			case j.State == repair.JobFailed:
				return j.Problems, fmt.Errorf("verification: %s", j.Message)
			}
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}
