package asd

import "fmt"

// CheckKey returns ErrInvalid if a key has no byte or too many.
func CheckKey(key string) error {
	if len(key) == 0 || len(key) > MaxKeyBytes {
		return fmt.Errorf("%w: key of %d bytes, want 1 to %d", ErrInvalid, len(key), MaxKeyBytes)
	}
	return nil
}

// CheckKeys checks the keys of a MultiGet or Exists.
func CheckKeys(keys []string) error {
	if len(keys) > MaxKeys {
		return fmt.Errorf("%w: %d keys, want at most %d", ErrInvalid, len(keys), MaxKeys)
	}
	for _, key := range keys {
		if err := CheckKey(key); err != nil {
			return err
		}
	}
	return nil
}

// CheckSpan checks the range of a ReadAt.
func CheckSpan(key string, off, size int64) error {
	if off < 0 || size < 0 || off > MaxValueBytes || size > MaxValueBytes {
		return fmt.Errorf("%w: key %q: %d bytes at %d, want both from 0 to %d", ErrInvalid, key, size, off, MaxValueBytes)
	}
	return nil
}

// CheckRange checks a Range and returns its limit.
func CheckRange(req *RangeRequest) (limit int, err error) {
	if len(req.From) > MaxKeyBytes || len(req.To) > MaxKeyBytes {
		return 0, fmt.Errorf("%w: range of keys longer than %d bytes", ErrInvalid, MaxKeyBytes)
	}
	if req.Limit <= 0 || req.Limit > MaxKeys {
		return MaxKeys, nil
	}
	return req.Limit, nil
}

func checkNamespace(ns string) error {
	if len(ns) == 0 || len(ns) > MaxNamespaceBytes {
		return fmt.Errorf("%w: namespace of %d bytes, want 1 to %d", ErrInvalid, len(ns), MaxNamespaceBytes)
	}
	return nil
}

// CheckApply checks the limits of an Apply, but not its values' checksums.
func CheckApply(asserts []Assert, updates []Update) error {
	if len(asserts) > MaxAsserts || len(updates) > MaxUpdates {
		return fmt.Errorf("%w: %d asserts and %d updates, want at most %d and %d", ErrInvalid, len(asserts), len(updates), MaxAsserts, MaxUpdates)
	}
	compared, put := 0, 0
	for i := range asserts {
		a := &asserts[i]
		compared += len(a.Data)
		err := a.check()
		if err == nil && compared > MaxAssertsBytes {
			err = fmt.Errorf("%w: values of more than %d bytes in all asserts", ErrInvalid, MaxAssertsBytes)
		}
		if err != nil {
			return fmt.Errorf("assert %d: %w", i, err)
		}
	}
	for i := range updates {
		u := &updates[i]
		put += len(u.Value.Data)
		err := u.check()
		if err == nil && put > MaxValueBytes {
			err = fmt.Errorf("%w: values of more than %d bytes together", ErrInvalid, MaxValueBytes)
		}
		if err != nil {
			return fmt.Errorf("update %d: %w", i, err)
		}
	}
	return nil
}

// CheckAdopt checks the limits of the file's parts of an Adopt.
func CheckAdopt(parts []FilePart, updates []Update) error {
	if len(parts) == 0 || len(parts)+len(updates) > MaxUpdates {
		return fmt.Errorf("%w: %d parts of a file and %d updates, want at least one part and at most %d together", ErrInvalid, len(parts), len(updates), MaxUpdates)
	}
	for i := range parts {
		p := &parts[i]
		if err := CheckKey(p.Key); err != nil {
			return fmt.Errorf("part %d: %w", i, err)
		}
		switch {
		case p.Off < 0 || p.Off%DefaultBlockSize != 0 || p.Size < 1 || p.Size > MaxValueBytes:
			return fmt.Errorf("%w: part %d: %d bytes at %d, want 1 to %d at a multiple of %d", ErrInvalid, i, p.Size, p.Off, MaxValueBytes, DefaultBlockSize)
		case len(p.CRCs) != Blocks(p.Size, DefaultBlockSize):
			return fmt.Errorf("%w: part %d: %d checksums for %d blocks", ErrInvalid, i, len(p.CRCs), Blocks(p.Size, DefaultBlockSize))
		}
	}
	return nil
}

func (a *Assert) check() error {
	switch a.Kind {
	case KindAssertAbsent, KindAssertSum:
		return CheckKey(a.Key)
	case KindAssertValue:
		if len(a.Data) > MaxAssertBytes {
			return fmt.Errorf("%w: value of %d bytes, want at most %d", ErrInvalid, len(a.Data), MaxAssertBytes)
		}
		return CheckKey(a.Key)
	case KindAssertEpoch:
		return checkNamespace(a.Key)
	}
	return fmt.Errorf("%w: kind %d", ErrInvalid, a.Kind)
}

func (u *Update) check() error {
	switch u.Kind {
	case KindPut:
		if err := CheckKey(u.Key); err != nil {
			return err
		}
		return u.Value.CheckSizes(u.Key)
	case KindDelete:
		return CheckKey(u.Key)
	case KindRaiseEpoch:
		return checkNamespace(u.Key)
	}
	return fmt.Errorf("%w: kind %d", ErrInvalid, u.Kind)
}
